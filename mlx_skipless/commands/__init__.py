"""The commands, a module each: ``HELP``, ``arguments(parser)`` and ``run(options)``."""
