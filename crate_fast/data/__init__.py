"""The data of a run: where it lies, in which order it comes, how it is changed, and its way to the device."""
