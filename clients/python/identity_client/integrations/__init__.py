"""The SDK inside other people's frameworks, one module each; none is imported unasked."""
