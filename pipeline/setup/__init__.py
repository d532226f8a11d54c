"""Creation and checks of an environment: the installer, the locks, the doctor, the revision of the source.

Only `pipeline.cli`, the Makefile and the build of a wheel use this room; `install` needs the standard library alone."""
