"""What a `LoaderConfig` is made of; `lorax_async.config` has all of it."""
