"""One file per pretraining method; installs as ``effprof.methods``.

A file is a method when its name has no leading underscore. Nothing else names methods.
"""

if __name__ != "effprof.methods":
    raise ImportError(
        f"methods was imported as {__name__!r}; install effprof (pip install -e .) and import "
        f"effprof.methods"
    )

DEFAULT = "full"
