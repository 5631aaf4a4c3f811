"""Record spans of the loader's work, and write and draw them as a trace (docs/tracing.md).

All parts of a loader record into its `Tracer`, which costs one test while no trace is recorded.
This package imports `errors`, `events` and `types` only.

- `recorder.py`: `Tracer` and `Recorder`, rings of spans, and recorders for copies, layers, slots
- `trace.py`: `Trace`, which `AdapterLoader.trace` returns, and Chrome's trace event format
- `drawing.py`: read a trace file, and draw it as an image or an HTML page
- `timeline.js`: draw a trace in a browser; for the HTML page and the server's page
"""
