// Probabilities of the token after each prompt, by llama.cpp:  node probabilities.mjs '{"model", "lora"?, "prompts"}'
// Prints a list for each prompt, a number for each token of the vocabulary.
import {getLlama} from "node-llama-cpp";

const {model: modelPath, lora, prompts} = JSON.parse(process.argv[2]);
const llama = await getLlama({build: "never", gpu: false, logLevel: "error"});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({
    contextSize: 512, threads: 1, lora: lora && {adapters: [{filePath: lora, scale: 1}]}
});
const sequence = context.getSequence();
const found = [];
for (const prompt of prompts) {
    await sequence.clearHistory();
    const last = [prompt.at(-1), {generateNext: {probabilities: true}}];
    const output = await sequence.controlledEvaluate([...prompt.slice(0, -1), last]);
    const {probabilities} = output.at(-1).next;
    found.push(Array.from({length: probabilities.size}, (_, token) => probabilities.get(token)));
}
console.log(JSON.stringify(found));
process.exit(0);
