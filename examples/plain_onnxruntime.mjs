// Ask a predictor from JavaScript: node plain_onnxruntime.mjs smartfrz-base.onnx request.json
// As plain_onnxruntime.py, with the same request and the same answer. Once, in this folder: npm install
// onnxruntime-web knows of no optional inputs: "position" and "loss" cannot be passed, and are unknown to the predictor.
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-web";

// onnxruntime-web does not tell a file's own metadata: field 14 of the protobuf message, entries of key (1) and value (2).
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    for (let value = 0, unit = 1; ; unit *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * unit;
      if (!(byte > 127)) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    if ((tag & 7) === 0) varint();
    else if ((tag & 7) !== 2) at += (tag & 7) === 1 ? 8 : 4;
    else {
      const length = varint();
      yield [tag >> 3, bytes.subarray(at, (at += length))];
    }
  }
}
const file = readFileSync(process.argv[2]);
const facts = {};
for (const [number, entry] of fields(file)) {
  if (number !== 14) continue;
  const { 1: key, 2: value } = Object.fromEntries(fields(entry));
  facts[key.toString()] = value.toString();
}

ort.env.logLevel = "error";
ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(file);
const { layers, history, lengths } = JSON.parse(readFileSync(process.argv[3]));
const answer = await session.run({
  history: new ort.Tensor("float32", history.flat(2), [history.length, history[0].length, history[0][0].length]),
  lengths: new ort.Tensor("int64", lengths.map(BigInt), [lengths.length]),
});
const threshold = Number(facts["smartfrz.threshold"]);
console.log(JSON.stringify({ predictor: facts["smartfrz.name"], threshold }));
layers.forEach((layer, i) => {
  const confidence = answer.confidence.data[2 * i + 1]; // of keep training, freeze
  console.log(JSON.stringify({ layer, confidence, freeze: confidence >= threshold }));
});
