"""The model actor for a machine without a GPU: what NDIF_MODEL_IMPORT_PATH names. Imported by the server only."""

import os

import ray
import torch
from ndif.services.ray.deployments.modeling.base import HuggingFaceModel  # pyright: ignore[reportMissingImports]
from ndif.services.ray.sandbox.model import SandboxModelDeployment  # pyright: ignore[reportMissingImports]


@ray.remote(num_cpus=1, max_restarts=-1)
class CPUModelActor(SandboxModelDeployment):
    """ndif's actor, loading to the CPU; who sends the sandboxed key is run as the public service runs strangers."""

    CACHEABLE = False  # parked weights would go to the CPU, where they are

    def load_from_disk(self):
        # Here and not at the head of the file: Ray sends this class by value, so the worker never runs the module.
        if not torch.cuda.is_available():
            torch.cuda.synchronize = lambda *_: None  # ndif calls it around every request, GPU or not
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self.gpu_mem_bytes_by_id = {}  # the GPU that the controller allotted is made up
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device_map="cpu", **self.kwargs
        )
        model._module.eval().requires_grad_(False)
        return model

    async def run(self, request):
        # Without a key database every request is trusted; with one, this is the tag `trusted` of a key.
        request.trusted = request.api_key != os.environ.get("NDIF_SANDBOXED_KEY")
        await super().run(request)
