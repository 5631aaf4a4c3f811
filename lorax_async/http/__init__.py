"""The range downloader: files from web servers, by ranges over many connections.

It knows URLs and bytes, and no adapters; it may import `urls`, `formats.spans`, `telemetry`
and `errors`.
Threads of its own take pieces from one scheduler, in layer order; a server that stalls delays only
its own files.

- `range_downloader`: the interface, `RangeDownloader.probe` and `download`, and their jobs
- `download_scheduler`: shares of the connections, retries, stalled origins, worker threads
- `ranges`: which ranges to request, in which waves
- `client`, `connection`: requests, redirects, addresses, sockets, kept connections
- `target`: a file's URL and validators, the checks of a response
- `settings`: limits, timeouts, rules for addresses, TLS, proxies
- `failures`: retries, and errors of the network as ours
"""
