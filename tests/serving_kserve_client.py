"""Asks a server through kserve's own clients: `python serving_kserve_client.py PORT GRPC_PORT NAME FILE.npz`.

Prints the answers as JSON. A process of its own, since kserve and tritonclient register the same protobuf names.
"""

import asyncio
import json
import sys

import numpy as np

if __name__ == "__main__":  # pytest imports it, to look for doctests
    import grpc
    from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
    from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub


def asked(name, arrays, binary):
    inputs = []
    for key, datatype in (("history", "FP32"), ("lengths", "INT64")):
        tensor = InferInput(key, list(arrays[key].shape), datatype)
        tensor.set_data_from_numpy(arrays[key], binary_data=binary)
        inputs.append(tensor)
    return InferRequest(name, inputs, request_id="a-request")


def told(answer):
    return {output.name: output.as_numpy().tolist() for output in answer.outputs} | {"id": answer.id}


async def codes(target, name):
    """Return the status codes of requests that are refused over gRPC."""
    results = {}
    async with grpc.aio.insecure_channel(target) as channel:
        stub = GRPCInferenceServiceStub(channel)
        metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name=name))
        results["inputs"] = {t.name: [t.datatype, *t.shape] for t in metadata.inputs}
        results["live"] = (await stub.ServerLive(pb.ServerLiveRequest())).live
        results["ready"] = (await stub.ServerReady(pb.ServerReadyRequest())).ready
        results["model ready"] = (await stub.ModelReady(pb.ModelReadyRequest(name=name))).ready
        results["server"] = (await stub.ServerMetadata(pb.ServerMetadataRequest())).name
        tensor = pb.ModelInferRequest.InferInputTensor
        lengths = tensor(name="lengths", datatype="INT64", shape=[2])
        one, two = np.ones(2, np.int64).tobytes(), np.full(2, 2, np.int64).tobytes()

        def history(*shape, datatype="FP32", name="history"):
            return tensor(name=name, datatype=datatype, shape=shape)

        zeros = bytes(2 * 64 * 4)
        refused = {
            "nan": ([history(2, 1, 64), lengths], [np.full(128, np.nan, np.float32).tobytes(), one]),
            "other shape": ([history(2, 1, 63), lengths], [bytes(2 * 63 * 4), one]),
            "too few bytes": ([history(2, 1, 64), lengths], [zeros[:-1], one]),
            "huge claim": ([history(2**31, 2**31, 64), lengths], [zeros, one]),
            "negative claim": ([history(2, -1, 64), lengths], [zeros, one]),
            "other datatype": ([history(2, 1, 64, datatype="FP64"), lengths], [zeros, one]),
            "no datatype": ([history(2, 1, 64, datatype="X"), lengths], [zeros, one]),
            "other name": ([history(2, 1, 64, name="x"), lengths], [zeros, one]),
            "twice": ([history(2, 1, 64), history(2, 1, 64)], [zeros, zeros]),
            "lengths": ([history(2, 1, 64), lengths], [zeros, two]),
            "nothing": ([], []),
            "no raw": ([history(2, 1, 64), lengths], []),
            "one raw": ([history(2, 1, 64), lengths], [zeros]),
        }
        calls = {
            case: (stub.ModelInfer, pb.ModelInferRequest(model_name=name, inputs=inputs, raw_input_contents=raw))
            for case, (inputs, raw) in refused.items()
        }
        good = {"inputs": [history(2, 1, 64), lengths], "raw_input_contents": [zeros, one]}
        calls |= {
            "another version": (stub.ModelInfer, pb.ModelInferRequest(model_name=name, model_version="7", **good)),
            "another model": (stub.ModelInfer, pb.ModelInferRequest(model_name="x", **good)),
            "another output": (stub.ModelInfer, pb.ModelInferRequest(model_name=name, outputs=[{"name": "x"}], **good)),
            "metadata of another": (stub.ModelMetadata, pb.ModelMetadataRequest(name="x")),
            "readiness of another": (stub.ModelReady, pb.ModelReadyRequest(name="x")),
            "load": (stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name=name)),
            "unload": (stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name=name)),
            "too large": (
                stub.ModelInfer,
                pb.ModelInferRequest(model_name=name, raw_input_contents=[bytes(3 * 2**20)]),
            ),
        }
        for case, (call, message) in calls.items():
            try:
                await call(message)
                results[case] = "OK"
            except grpc.aio.AioRpcError as error:
                results[case] = f"{error.code().name}: {error.details()}"
        wanted = pb.ModelInferRequest(model_name=name, outputs=[{"name": "confidence"}], **good)
        results["outputs"] = [output.name for output in (await stub.ModelInfer(wanted)).outputs]
    return results


async def main():
    port, grpc_port, name, file = sys.argv[1:]
    arrays = dict(np.load(file))
    target, url = f"127.0.0.1:{grpc_port}", f"http://127.0.0.1:{port}"
    rest = InferenceRESTClient(RESTConfig(protocol="v2", retries=0, timeout=60))
    rpc = InferenceGRPCClient(target, timeout=60)
    results = {
        "rest live": await rest.is_server_live(url),
        "rest ready": await rest.is_server_ready(url),
        "rest model ready": await rest.is_model_ready(url, name),
        "grpc ready": await rpc.is_server_ready(),
        "rest json": told(await rest.infer(url, asked(name, arrays, False), model_name=name)),
        "rest binary": told(await rest.infer(url, asked(name, arrays, True), model_name=name)),
        "grpc json": told(await rpc.infer(asked(name, arrays, False))),
        "grpc binary": told(await rpc.infer(asked(name, arrays, True))),
    }
    await rest.close()
    await rpc.close()
    print(json.dumps(results | await codes(target, name)))


if __name__ == "__main__":
    asyncio.run(main())
