"""The parts of one loader, between the API, the lifecycle's decisions and I/O.

    assembly         constructs, opens and closes the parts
    acquire          a load, stream, pin or prefetch within its deadline
    prefetch         the loads of one prefetch, and which of them fit
    resolver         ids to adapter keys; equal requests share one resolve
    waiters          calls that wait for a load or an unload
    leases           leases, slot occupancies and their watermarks; pins
    driver           executes the lifecycle's commands, returns outcomes
    fetches          fetch, populate and release tasks; transfer plans
    copies           copies of layer groups in the I/O threads
    digest_checks    compares weights with callers' digests
    tensor_adapters  ids that mean tensors from memory
    folders          leases on folders of verified files
    placement        the tier and memory of each adapter
    telemetry        events, statistics and budgets

It may import everything below the loader: lifecycle, planning, sources, devices, cache, tracing.
All of it runs on the loader's event loop, except where a docstring says otherwise.
"""
