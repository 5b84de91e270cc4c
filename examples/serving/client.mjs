// Ask `smartfrz serve` from JavaScript: node client.mjs http://127.0.0.1:8080 smartfrz-base request.json
// Node 18 or newer, and nothing else. Request and answer are those of client_rest.py.
import { readFileSync } from "node:fs";

const [server, name, file] = process.argv.slice(2);
const address = `${server}/v2/models/${name}`;

async function get(...request) {
  const answer = await fetch(...request);
  const document = await answer.json();
  if (!answer.ok) throw new Error(`${answer.status}: ${document.error}`);
  return document;
}

const model = await get(address);
const inputs = Object.fromEntries(model.inputs.map((tensor) => [tensor.name, tensor]));

function madeUp(records = 8, size = inputs.history.shape.at(-1)) {
  const random = (scale) => scale * (Math.random() - 0.5);
  const history = [0, 0.1].map((speed) => {
    let weights = Array.from({ length: size }, () => random(1));
    return Array.from({ length: records }, () => (weights = weights.map((weight) => weight + random(speed))));
  });
  const falling = Array.from({ length: records }, (_, record) => 1 + 1 / (record + 1));
  return { layers: ["still", "moving"], history, lengths: [records, records], position: [0, 1], loss: [falling, falling] };
}
const request = file ? JSON.parse(readFileSync(file)) : madeUp();

// Numbers go as binary data, little-endian as every machine with Node has them: JSON is five times as large.
const tensors = Object.keys(inputs)
  .filter((key) => key in request)
  .map((key) => {
    const shape = [];
    for (let part = request[key]; Array.isArray(part); part = part[0]) shape.push(part.length);
    const flat = request[key].flat(2);
    const array = inputs[key].datatype === "INT64" ? BigInt64Array.from(flat, BigInt) : Float32Array.from(flat);
    return { key, shape, array };
  });
const header = JSON.stringify({
  inputs: tensors.map(({ key, shape, array }) => ({
    name: key,
    datatype: inputs[key].datatype,
    shape,
    parameters: { binary_data_size: array.byteLength },
  })),
  outputs: [{ name: "confidence" }],
});
const answer = await get(`${address}/infer`, {
  method: "POST",
  headers: {
    "Content-Type": "application/octet-stream",
    "Inference-Header-Content-Length": String(Buffer.byteLength(header)),
  },
  body: Buffer.concat([Buffer.from(header), ...tensors.map(({ array }) => Buffer.from(array.buffer))]),
  signal: AbortSignal.timeout(30_000),
});

const threshold = Number(model.properties["smartfrz.threshold"]);
console.log(JSON.stringify({ predictor: model.properties["smartfrz.name"], threshold }));
request.layers.forEach((layer, index) => {
  const confidence = answer.outputs[0].data[2 * index + 1]; // of keep training, freeze
  console.log(JSON.stringify({ layer, confidence, freeze: confidence >= threshold }));
});
