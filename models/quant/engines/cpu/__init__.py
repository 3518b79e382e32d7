"""Every kernel for a CPU: the engine (`engine`), and what runs between the crossbar layers (`elementwise`, `image`, `output`)."""
