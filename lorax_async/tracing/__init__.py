"""What happened when: recorded by the loader's parts, exported as a trace, drawn as a timeline.

`recorder` has the rings that spans go to, `trace` a recording and its events in Chrome's format,
`drawing` and `timeline.js` the timeline: an image by matplotlib, and a canvas in a browser.
"""
