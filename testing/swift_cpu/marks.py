"""A plug-in of ms-swift: a callback that tells whoever records collectives how many iterations are done."""

import os

from swift.megatron.callbacks import MegatronCallback, megatron_callbacks_map


class Marks(MegatronCallback):
    """See `testing.megatron_cpu`."""

    def on_step_begin(self):
        os.environ["MEGATRON_CPU_ITERATION"] = str(self.state.iteration)


megatron_callbacks_map["marks"] = Marks
