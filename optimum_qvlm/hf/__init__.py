"""The plugin: configuration, quantizer, checkpoint format."""
