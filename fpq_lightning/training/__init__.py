"""The Lightning side: module, datamodule, callbacks, strategy and run directories."""
