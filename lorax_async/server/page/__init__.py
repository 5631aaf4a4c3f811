"""The server's dashboard at /: adapters, their tiers, and the trace of the last cold request.

- `routes.py`: the page's files, its event stream and its trace
- `dashboard.py`: the rows that viewers may see, and what changed since the last event
- `page.html`, `page.css`, `page.js`, `events.js`: the page, which needs nothing from elsewhere
"""
