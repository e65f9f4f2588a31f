"""Power of the boards that the shipped tiers are meant for; joules modelled from it say so. See docs/energy.md."""

DEVICE_ENERGY = {
    "watts": 6.12,
    "source": "Raspberry Pi documentation, Power Supply: Raspberry Pi 4B under stress, 1.2 A at 5.1 V",
}
EDGE_ENERGY = {
    "watts": 25.0,
    "source": "NVIDIA Jetson Orin NX Series datasheet: power configurable between 10 W and 25 W, upper end",
}
