"""`tritonclient.grpc` in a process of its own, for test_grpc: plain functions of plain values. Imports no app.grpc,
which has the protocol's messages under the same names.
"""

import asyncio
from typing import Any

import numpy as np

from tests.server.test_tritonclient import Answer, Refusal


def arguments(model: str, inputs: dict[str, np.ndarray], more: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the client's `infer`."""
    from tritonclient.grpc import InferInput, InferRequestedOutput
    from tritonclient.utils import np_to_triton_dtype

    tensors = []
    for name, array in inputs.items():
        tensors.append(InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        tensors[-1].set_data_from_numpy(array)
    wanted = [InferRequestedOutput(name, class_count=count) for name, count in more.pop("outputs", {}).items()]
    return {"model_name": model, "inputs": tensors, "outputs": wanted or None, **more}


def prepared(method: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Arguments as the client's method takes them."""
    if method == "infer":
        return (), arguments(*args, kwargs)
    return args, {**kwargs, "as_json": True} if method.startswith("get") else kwargs


def answer_of(result: Any) -> Answer:
    response = result.get_response()
    names = [output.name for output in response.outputs]
    about = {"model_name": response.model_name, "model_version": response.model_version, "id": response.id}
    return Answer(about, {name: result.as_numpy(name) for name in names})


def plain(result: Any) -> Any:
    """What can be sent to another process."""
    return result if isinstance(result, bool | dict) else answer_of(result)


def ask_sync(url: str, method: str, args: tuple, kwargs: dict) -> Any:
    """A method of the client: its value, or Refusal."""
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    args, kwargs = prepared(method, args, kwargs)
    with InferenceServerClient(url) as client:
        try:
            return plain(getattr(client, method)(*args, **kwargs))
        except InferenceServerException as error:
            return Refusal(error.message(), error.status())


def ask_aio(url: str, method: str, args: tuple, kwargs: dict) -> Any:
    """The same of the asyncio client."""
    from tritonclient.grpc.aio import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    args, kwargs = prepared(method, args, kwargs)

    async def use() -> Any:
        async with InferenceServerClient(url) as client:
            try:
                return plain(await getattr(client, method)(*args, **kwargs))
            except InferenceServerException as error:
                return Refusal(error.message(), error.status())

    return asyncio.run(use())
