"""One loader at work: the driver between the lifecycle's decisions and I/O.

`assembly` puts the parts together and takes them apart. `acquire` turns a call into a lease;
`driver` carries out the lifecycle's commands by `fetches` (tasks) and `copies` (threads), and
returns their outcomes to it.
"""
