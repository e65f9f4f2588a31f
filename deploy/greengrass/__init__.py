"""The stack as components of AWS IoT Greengrass v2, for both of its nuclei: classic and lite."""
