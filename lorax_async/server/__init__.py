"""An OpenAI-compatible server whose requests name adapters."""
