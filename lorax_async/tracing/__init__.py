"""What happened when, recorded by the loader's parts and written as a trace."""
