// A page that samples a model in the browser: sampler.json lists the ONNX graphs and their inputs.

const RUNTIME = new URL("RUNTIME", import.meta.url).href;  // folder of onnxruntime-web's files
const described = await (await fetch("sampler.json")).json();
const ort = await import(RUNTIME + "ort.wasm.bundle.min.mjs");
ort.env.wasm.numThreads = 1;  // more would need headers that a static page can't send
ort.env.wasm.wasmPaths = { wasm: RUNTIME + "ort-wasm-simd-threaded.wasm" };

const at = (id) => document.getElementById(id);
const sessions = new Map();  // by the number of steps; each is loaded at its first use

// Uniform numbers in [0, 1) from a 32-bit seed (mulberry32).
function uniform(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

// `count` unit normal numbers from a seed, by the Box-Muller transform.
function normals(seed, count) {
  const next = uniform(seed), values = new Float32Array(count);
  for (let i = 0; i < count; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(1 - next())), angle = 2 * Math.PI * next();
    values[i] = radius * Math.cos(angle);
    if (i + 1 < count) values[i + 1] = radius * Math.sin(angle);
  }
  return values;
}

const sizeOf = (shape) => shape.reduce((product, n) => product * n, 1);

async function sessionOf(sampler) {
  if (!sessions.has(sampler.steps)) {
    sessions.set(sampler.steps, ort.InferenceSession.create(sampler.onnx, { executionProviders: ["wasm"] }));
  }
  return sessions.get(sampler.steps);
}

// The pixels (C, H, W) in [0, 1] of one image. `noise` and `renoise` can be given instead of a seed.
async function sample({ steps, seed = 0, label = 0, guidance = 1, noise = null, renoise = null }) {
  const sampler = described.samplers.find((one) => one.steps === steps);
  const session = await sessionOf(sampler), size = sizeOf(described.sample_shape);
  const drawn = normals(seed, size * steps);
  const values = {
    noise: () => new ort.Tensor("float32", noise ?? drawn.slice(0, size), [1, ...described.sample_shape]),
    renoise: () => new ort.Tensor("float32", renoise ?? drawn.slice(size), [steps - 1, 1, ...described.sample_shape]),
    class_labels: () => new ort.Tensor("int64", BigInt64Array.of(BigInt(label)), [1]),
    guidance_scale: () => new ort.Tensor("float32", Float32Array.of(guidance), []),
  };
  const inputs = Object.fromEntries(Object.keys(sampler.inputs).map((name) => [name, values[name]()]));
  return (await session.run(inputs)).images.data;
}

function draw(pixels) {
  const [channels, height, width] = described.image_shape, area = height * width;
  const picture = new ImageData(width, height);
  for (let i = 0; i < area; i++) {
    for (let k = 0; k < 3; k++) {
      picture.data[4 * i + k] = Math.round(255 * pixels[(channels === 3 ? k : 0) * area + i]);
    }
    picture.data[4 * i + 3] = 255;
  }
  Object.assign(at("image"), { width, height });
  at("image").getContext("2d").putImageData(picture, 0, 0);
}

let asked = 0;

async function show() {
  const mine = ++asked, steps = Number(at("steps").value), seed = Number(at("seed").value);
  try {
    at("said").textContent = "Working…";
    await sessionOf(described.samplers.find((one) => one.steps === steps));
    const start = performance.now();
    const pixels = await sample({
      steps, seed, label: Number(at("class").value), guidance: Number(at("guidance").value),
    });
    if (mine !== asked) return;  // another image was requested in the meantime
    draw(pixels);
    const took = performance.now() - start;
    at("said").textContent = `${steps} step${steps > 1 ? "s" : ""}, ${took.toFixed(took < 10 ? 1 : 0)} ms`;
  } catch (error) {
    at("said").textContent = `This browser can't run the model (${error.message}). Reload the page, or try a current browser.`;
    throw error;
  }
}

function fill(select, options) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
}

const [, height, width] = described.image_shape, inputs = described.samplers[0].inputs;
document.title = at("title").textContent = described.model;
at("about").textContent = `Images of ${width} × ${height} pixels, made in your browser.`;
fill(at("steps"), described.samplers.map((one) => [one.steps, String(one.steps)]));
fill(at("class"), Object.entries(described.classes ?? { 0: "0" }));
at("for-class").hidden = !("class_labels" in inputs);
at("for-guidance").hidden = !("guidance_scale" in inputs);
at("form").addEventListener("change", show);
at("form").addEventListener("submit", (event) => { event.preventDefault(); show(); });
at("next").addEventListener("click", () => { at("seed").value = Number(at("seed").value) + 1; show(); });
Object.assign(window, { sample, normals });  // for use in the browser's console
await show();
document.body.dataset.ready = "yes";
