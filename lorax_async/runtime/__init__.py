"""The parts of one loader, between the API, the lifecycle's decisions and I/O.

    assembly   constructs, opens and closes the parts
    acquire    a load, stream, pin or prefetch within its deadline; ids that mean tensors
    driver     executes the lifecycle's commands, returns outcomes; calls that wait
    folders    leases on folders of verified files
    leases     leases, slot occupancies and their watermarks; pins; callers' digests
    fetches    fetch tasks; transfer plans
    host_tier  files that are mapped, so that they stay in memory
    resolver   ids to adapter keys; equal requests share one resolve
    placement  the tier and memory of each adapter

It may import everything below the loader: lifecycle, planning, sources, devices, cache, telemetry.
All of it runs on the loader's event loop, except where a docstring says otherwise.
"""
