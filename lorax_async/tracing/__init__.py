"""What happened when: recorded by the loader's parts, written as a trace, drawn as a picture."""
