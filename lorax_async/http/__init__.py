"""The range engine: files from web servers, by ranges over many connections.

It knows URLs and bytes, and no adapters. Threads of its own take ranges from one scheduler, in
layer order; a server that stalls holds up only those who want its files.
"""
