"""Found by Python at the start of processes that a run spawns (checkpoint writers): they need the shim too."""

from testing import bridge_cpu
from testing.megatron_cpu import shim

shim.install()
bridge_cpu.install()
