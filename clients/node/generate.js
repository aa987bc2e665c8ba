// Generates with slora from Node, straight from the protos:  node generate.js localhost:50051 MODEL PROMPT
const path = require("path");
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");

const definition = protoLoader.loadSync("slora/gateway/v1/inference.proto", {
  includeDirs: [path.join(__dirname, "../../protos")],
  defaults: true, // else an empty text is undefined
  longs: Number,
  enums: String,
});
const { InferenceService } = grpc.loadPackageDefinition(definition).slora.gateway.v1;

const [address, model, prompt] = process.argv.slice(2);
if (prompt === undefined) {
  console.error("usage: node generate.js HOST:PORT MODEL PROMPT");
  process.exit(2);
}
const client = new InferenceService(address, grpc.credentials.createInsecure());
const call = client.generate({ model, prompt: { text: prompt }, stopping: { maxTokens: 40 } });

call.on("data", (message) => {
  process.stdout.write(message.text);
  if (message.completion) console.error(JSON.stringify(message.completion));
});
call.on("error", (error) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
call.on("end", () => client.close());
