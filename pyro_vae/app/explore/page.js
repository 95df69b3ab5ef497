"use strict";
/* The explorer of a latent space. In this order: the arrays, the decoder (layers, link), geometry of a plane, pictures,
   and what the user does. z is always the whole latent vector; whatever is drawn follows from it.
   For tests and the console: window.explorer. */

/* ---- Arrays: one block, deflated, in base64 ---------------------------------------------------------------------- */

async function unpack(text, table) {
  const coded = atob(text), bytes = new Uint8Array(coded.length);
  for (let i = 0; i < coded.length; i++) bytes[i] = coded.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  const block = await new Response(stream).arrayBuffer();
  return table.map(({ kind, shape, start }) => {
    const count = shape.reduce((a, b) => a * b, 1);
    const values = kind === "u1" ? new Uint8Array(block, start, count)
      : kind === "f4" ? new Float32Array(block, start, count) : fromHalves(new Uint16Array(block, start, count));
    return { shape, values };
  });
}

/* float16: a sign, five bits of exponent, ten of fraction. */
function fromHalves(bits) {
  const out = new Float32Array(bits.length);
  for (let i = 0; i < bits.length; i++) {
    const b = bits[i], exponent = (b >> 10) & 31, fraction = b & 1023;
    const size = exponent === 0 ? fraction * 2 ** -24
      : exponent === 31 ? (fraction ? NaN : Infinity) : (1 + fraction / 1024) * 2 ** (exponent - 15);
    out[i] = b & 0x8000 ? -size : size;
  }
  return out;
}

/* ---- Layers: what each makes of { shape, values } ---------------------------------------------------------------- */

const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));

/* The error function to 1.5e-7: Abramowitz and Stegun 7.1.26. */
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const sum = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - sum * Math.exp(-x * x));
}

const ACTIVATIONS = {
  silu: (x) => x * sigmoid(x),
  relu: (x) => Math.max(x, 0),
  gelu: (x) => 0.5 * x * (1 + erf(x * Math.SQRT1_2)),
  elu: (x) => (x > 0 ? x : Math.expm1(x)),
  tanh: Math.tanh,
  softplus,
  identity: (x) => x,
};

/* The matrix of rows x inner numbers A[r * byRow + k * byInner] times that of inner x columns numbers B, row by row: four
   rows of B at a time, so that each number of the result is loaded and stored a quarter as often. */
function product(A, byRow, byInner, rows, inner, B, columns) {
  const out = new Float32Array(rows * columns);
  for (let r = 0; r < rows; r++) {
    const to = r * columns, whole = inner - (inner % 4);
    for (let k = 0; k < whole; k += 4) {
      const at = r * byRow + k * byInner;
      const a0 = A[at], a1 = A[at + byInner], a2 = A[at + 2 * byInner], a3 = A[at + 3 * byInner];
      const b0 = k * columns, b1 = b0 + columns, b2 = b1 + columns, b3 = b2 + columns;
      for (let p = 0; p < columns; p++) out[to + p] += a0 * B[b0 + p] + a1 * B[b1 + p] + a2 * B[b2 + p] + a3 * B[b3 + p];
    }
    for (let k = whole; k < inner; k++) {
      const a = A[r * byRow + k * byInner];
      for (let p = 0; p < columns; p++) out[to + p] += a * B[k * columns + p];
    }
  }
  return out;
}

/* For each (channel, i, j, y, x) of a convolution, the place of [channel, stride y + i - padding, stride x + j - padding]. */
function places(channels, [kh, kw], [high, wide], [height, width], stride, padding, use) {
  for (let c = 0; c < channels; c++) for (let i = 0; i < kh; i++) for (let j = 0; j < kw; j++)
    for (let y = 0; y < high; y++) {
      const row = stride[0] * y + i - padding[0], line = (((c * kh + i) * kw + j) * high + y) * wide;
      if (row < 0 || row >= height) continue;
      const from = (c * height + row) * width;
      for (let x = 0; x < wide; x++) {
        const column = stride[1] * x + j - padding[1];
        if (column >= 0 && column < width) use(line + x, from + column);
      }
    }
}

function plusBias(values, bias, pixels) {
  if (bias) for (let i = 0; i < values.length; i++) values[i] += bias.values[Math.floor(i / pixels)];
  return values;
}

const LAYERS = {
  linear({ weight, bias }, { values }) {
    const [rows, columns] = weight.shape, w = weight.values, out = new Float32Array(rows), whole = columns - (columns % 4);
    for (let r = 0; r < rows; r++) {
      const at = r * columns;
      let s0 = bias ? bias.values[r] : 0, s1 = 0, s2 = 0, s3 = 0;  // four sums that need not wait for each other
      for (let c = 0; c < whole; c += 4) {
        s0 += w[at + c] * values[c];
        s1 += w[at + c + 1] * values[c + 1];
        s2 += w[at + c + 2] * values[c + 2];
        s3 += w[at + c + 3] * values[c + 3];
      }
      for (let c = whole; c < columns; c++) s0 += w[at + c] * values[c];
      out[r] = s0 + s1 + s2 + s3;
    }
    return { shape: [rows], values: out };
  },
  gate({ activation }, { values }) {
    const half = values.length / 2, act = ACTIVATIONS[activation], out = new Float32Array(half);
    for (let i = 0; i < half; i++) out[i] = act(values[i]) * sigmoid(values[half + i]);
    return { shape: [half], values: out };
  },
  reshape: ({ shape }, { values }) => ({ shape, values }),
  /* out[o, y, x] = bias[o] + sum over c, i, j of weight[o, c, i, j] in[c, stride y + i - padding, stride x + j - padding] */
  convolution({ weight, bias, stride, padding }, { shape: [channels, height, width], values }) {
    const [outs, , kh, kw] = weight.shape, inner = channels * kh * kw;
    const high = Math.floor((height + 2 * padding[0] - kh) / stride[0]) + 1;
    const wide = Math.floor((width + 2 * padding[1] - kw) / stride[1]) + 1;
    const patches = new Float32Array(inner * high * wide);
    places(channels, [kh, kw], [high, wide], [height, width], stride, padding, (patch, pixel) => { patches[patch] = values[pixel]; });
    const out = product(weight.values, inner, 1, outs, inner, patches, high * wide);
    return { shape: [outs, high, wide], values: plusBias(out, bias, high * wide) };
  },
  /* out[o, stride y + i - padding, stride x + j - padding] += weight[c, o, i, j] in[c, y, x] */
  transposed({ weight, bias, stride, padding, extra }, { shape: [channels, height, width], values }) {
    const [, outs, kh, kw] = weight.shape, rows = outs * kh * kw;
    const high = (height - 1) * stride[0] - 2 * padding[0] + kh + extra[0];
    const wide = (width - 1) * stride[1] - 2 * padding[1] + kw + extra[1];
    const patches = product(weight.values, 1, rows, rows, channels, values, height * width);
    const out = new Float32Array(outs * high * wide);
    places(outs, [kh, kw], [height, width], [high, wide], stride, padding, (patch, pixel) => { out[pixel] += patches[patch]; });
    return { shape: [outs, high, wide], values: plusBias(out, bias, high * wide) };
  },
  /* Of groups of channels, over all their pixels. */
  norm({ groups, eps, weight, bias }, { shape, values }) {
    const size = values.length / groups, pixels = values.length / shape[0], out = new Float32Array(values.length);
    for (let g = 0; g < groups; g++) {
      const part = values.subarray(g * size, (g + 1) * size);
      let mean = 0, square = 0;
      for (const v of part) mean += v / size;
      for (const v of part) square += (v - mean) ** 2 / size;
      const scale = 1 / Math.sqrt(square + eps);
      for (let i = 0; i < size; i++) {
        const channel = Math.floor((g * size + i) / pixels);
        out[g * size + i] = (part[i] - mean) * scale * (weight ? weight.values[channel] : 1)
          + (bias ? bias.values[channel] : 0);
      }
    }
    return { shape, values: out };
  },
  /* The nearest pixel, as torch's: the one at the scaled place, rounded down. */
  resize({ size: [high, wide] }, { shape: [channels, height, width], values }) {
    const out = new Float32Array(channels * high * wide);
    for (let c = 0, at = 0; c < channels; c++) for (let y = 0; y < high; y++) for (let x = 0; x < wide; x++)
      out[at++] = values[(c * height + Math.floor(y * height / high)) * width + Math.floor(x * width / wide)];
    return { shape: [channels, high, wide], values: out };
  },
  sum({ branches }, input) {
    const results = branches.map((branch) => run(branch, input)), out = results[0].values.slice();
    for (const { values } of results.slice(1)) for (let i = 0; i < out.length; i++) out[i] += values[i];
    return { shape: results[0].shape, values: out };
  },
};
for (const [name, act] of Object.entries(ACTIVATIONS))
  LAYERS[name] = (_, { shape, values }) => ({ shape, values: values.map(act) });

const run = (layers, input) => layers.reduce((x, layer) => LAYERS[layer.op](layer, x), input);

/* ---- Links: from what the decoder gives for P pixels, parameter after parameter, to their means ------------------ */

const LINKS = {
  sigmoid: (_, raw) => raw.map(sigmoid),
  /* 1 / (1 - e^-l) - 1 / l, by its series where both are large. */
  "continuous-bernoulli": (_, raw) => raw.map((l) =>
    Math.abs(l) < 0.05 ? 0.5 + l / 12 - l ** 3 / 720 : -1 / Math.expm1(-l) - 1 / l),
  identity: (link, raw, P) => scaled(link, raw.slice(0, P)),
  softplus: (link, raw, P) => scaled(link, raw.slice(0, P).map(softplus)),
  exp: (link, raw, P) => scaled(link, raw.slice(0, P).map(Math.exp)),
  levels({ levels }, raw, P) {
    return new Float32Array(P).map((_, p) => {
      let top = -Infinity, total = 0, sum = 0;
      for (let v = 0; v < levels; v++) top = Math.max(top, raw[v * P + p]);
      for (let v = 0; v < levels; v++) {
        const weight = Math.exp(raw[v * P + p] - top);
        total += weight;
        sum += weight * v;
      }
      return sum / total / (levels - 1);
    });
  },
  /* A mixture of M rounded logistics. */
  logistics({ components: M, levels, initial, minimum }, raw, P) {
    const steps = levels - 1, single = M === 1 && raw.length === 2 * P, shift = single ? 0 : M;
    return new Float32Array(P).map((_, p) => {
      let top = -Infinity, total = 0, sum = 0;
      for (let m = 0; !single && m < M; m++) top = Math.max(top, raw[m * P + p]);
      for (let m = 0; m < M; m++) {
        const weight = single ? 1 : Math.exp(raw[m * P + p] - top);
        const loc = ((m + 0.5) / M + 0.5 * raw[(shift + m) * P + p]) * steps;
        const scale = (minimum + initial * Math.exp(Math.min(raw[(shift + M + m) * P + p], 40))) * steps;
        total += weight;
        sum += weight * roundedMean(loc, scale, steps) / steps;
      }
      return sum / total;
    });
  },
};

/* The mean level of a logistic rounded to 0 ... n: the sum over v < n of P(level > v) = S((loc - v - 1/2) / scale). Of a
   wide one by the integral and the first term of Euler and Maclaurin, to 1e-3 of a level; of a narrow one term by term,
   where they are neither 0 nor 1. */
function roundedMean(loc, scale, n) {
  if (scale >= 1) {
    const slope = (t) => sigmoid(t) * sigmoid(-t) / scale;  // of -S at (loc - v) / scale in v
    return scale * (softplus(loc / scale) - softplus((loc - n) / scale))
      + (slope((loc - n) / scale) - slope(loc / scale)) / 24;
  }
  const first = Math.min(n, Math.max(0, Math.ceil(loc - 0.5 - 20 * scale))), last = Math.min(n - 1, Math.floor(loc - 0.5 + 20 * scale));
  let sum = first;
  for (let v = first; v <= last; v++) sum += sigmoid((loc - v - 0.5) / scale);
  return sum;
}

function scaled({ shift, stretch }, values) {
  return values.map((v, i) => (shift ? shift.values[i] : 0) + (stretch ? stretch.values[i] : 1) * v);
}

/* ---- Small linear algebra and the normal distribution ------------------------------------------------------------ */

const dot = (a, b) => { let sum = 0; for (let i = 0; i < a.length; i++) sum += a[i] * b[i]; return sum; };
const moved = (z, t, v) => z.map((value, i) => value + t * v[i]);  // z + t v

/* The quantile of N(0, 1), to 1e-8: bisection of its distribution function would do; Newton's steps are quicker. */
function probit(p) {
  let x = 0;
  for (let step = 0; step < 60; step++) {
    const error = 0.5 * (1 + erf(x * Math.SQRT1_2)) - p;
    const change = error * Math.sqrt(2 * Math.PI) * Math.exp(x * x / 2);
    x -= Math.max(-0.5, Math.min(0.5, change));
    if (Math.abs(change) < 1e-9) break;
  }
  return x;
}

/* Points of the ellipse |L^-1 (p - m)| = radius for the covariance L L' = [[a, b], [b, c]]. */
function ellipse([mx, my], [a, b, c], radius) {
  const l1 = Math.sqrt(a), l2 = l1 > 0 ? b / l1 : 0, l3 = Math.sqrt(Math.max(c - l2 * l2, 0)), points = [];
  for (let i = 0; i <= 72; i++) {
    const s = radius * Math.cos(Math.PI * i / 36), t = radius * Math.sin(Math.PI * i / 36);
    points.push([mx + l1 * s, my + l2 * s + l3 * t]);
  }
  return points;
}

/* ---- The page ---------------------------------------------------------------------------------------------------- */

/* Okabe and Ito's colours, told apart by the colour-blind; after eight of them another shape. */
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a7a00", "#333333"];
const SHAPES = ["circle", "triangle", "square", "cross"];
const GREY = "#718096", ORANGE = "#c05621", SIDE = 15, REACH = 0.98, MORPHS = 11, NEAR = 12;
const $ = (id) => document.getElementById(id);
const number = (x, digits = 2) => x.toFixed(digits).replace("-", "\u2212");

async function start() {
  const given = JSON.parse($("data").textContent);
  const arrays = await unpack($("arrays").textContent, given.arrays);
  const [C, H, W] = given.shape, P = C * H * W, D = given.latents, N = arrays[given.codes].shape[0];
  const row = (array, i) => array.values.subarray(i * array.values.length / array.shape[0],
    (i + 1) * array.values.length / array.shape[0]);

  /* Weights by their numbers become arrays. */
  const held = new Set(["weight", "bias", "shift", "stretch"]);
  const resolved = (item) => Array.isArray(item) ? item.map(resolved)
    : item !== null && typeof item === "object" ? Object.fromEntries(Object.entries(item).map(
      ([key, value]) => [key, held.has(key) && value !== null ? arrays[value] : resolved(value)]))
    : item;
  const layers = resolved(given.decoder.layers), link = resolved(given.decoder.link);

  function decode(z) {
    return LINKS[link.name](link, run(layers, { shape: [D], values: Float32Array.from(z) }).values, P);
  }

  /* The page's own proof: what torch gave for a few latents is what it computes itself. */
  const checkZ = arrays[given.check.z], checkX = arrays[given.check.x], span = given.span[1] - given.span[0];
  let away = 0;
  for (let i = 0; i < checkZ.shape[0]; i++) {
    const wanted = row(checkX, i);
    // Not Math.max(away, ...): a NaN, too, is to be seen.
    decode(row(checkZ, i)).forEach((x, p) => { const d = Math.abs(x - wanted[p]) / span; if (!(d <= away)) away = d; });
  }
  const right = away <= given.tolerance;
  $("about").textContent = `${given.dataset}: ${N.toLocaleString("en")} test data, ${D} latent${D > 1 ? "s" : ""}. ` +
    `This page decodes by itself, with weights in ${given.decoder.weights === "f2" ? "float16" : "float32"}; it is ` +
    `within ${away.toExponential(0)} of PyTorch.`;
  if (!right) {
    $("about").textContent = `This page decodes wrongly here: ${away} from PyTorch, wanted ${given.tolerance}. ` +
      "Do not trust its pictures, and report it with this browser's name.";
    $("about").className = "bad";
  }

  /* ---- Pictures ---- */

  const codes = arrays[given.codes], images = arrays[given.images];
  const code = (i) => Array.from(row(codes, i));
  const datum = (i) => Float32Array.from(row(images, i), (v) => given.span[0] + v / 255 * span);

  /* One image as a picture, pixel for pixel. */
  function put(context, x) {
    const picture = context.createImageData(W, H), colour = C === 3;
    for (let p = 0; p < H * W; p++) {
      for (let c = 0; c < 3; c++)
        picture.data[4 * p + c] = Math.round(255 * (x[(colour ? c : 0) * H * W + p] - given.span[0]) / span);
      picture.data[4 * p + 3] = 255;
    }
    context.putImageData(picture, 0, 0);
  }
  function show(canvas, x) {
    sized(canvas, W, H);
    if (x) put(canvas.getContext("2d"), x);
  }
  function sized(canvas, width, height) {
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  }
  /* Rows of latents, decoded a few at a time, so that the page stays awake; a newer call ends an older one. Each image is
     enlarged by whole pixels, so that its pixels and the lines between the images stay even. */
  const jobs = new Map(), one = document.createElement("canvas"), onto = one.getContext("2d");
  sized(one, W, H);
  function mosaic(canvas, rows) {
    const columns = Math.max(...rows.map((line) => line.length)), mark = {};
    const zoom = Math.max(1, Math.ceil((rows.length > 1 ? 48 : 96) / Math.max(W, H))), gap = 2;
    jobs.set(canvas, mark);
    sized(canvas, columns * (zoom * W + gap) - gap, rows.length * (zoom * H + gap) - gap);
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    const cells = rows.flatMap((line, r) => line.map((z, c) => [z, c * (zoom * W + gap), r * (zoom * H + gap)]));
    return new Promise((done) => {
      const part = () => {
        const until = performance.now() + 12;
        while (cells.length && performance.now() < until && jobs.get(canvas) === mark) {
          const [z, left, top] = cells.shift();
          put(onto, decode(z));
          context.drawImage(one, left, top, zoom * W, zoom * H);
        }
        if (cells.length && jobs.get(canvas) === mark) setTimeout(part, 0); else done();
      };
      part();
    });
  }
  let later = null;
  function soon(work) { clearTimeout(later); later = setTimeout(work, 150); }

  /* ---- State ---- */

  const zero = new Array(D).fill(0);
  const order = [...given.activity.keys()].sort((a, b) => given.activity[b] - given.activity[a]);
  const active = order.filter((d) => given.activity[d] > 0.01);
  const state = {
    z: zero.slice(), hover: null, chosen: null, only: null, kind: D > 2 ? "components" : "latents",
    axes: D > 1 ? (D === 2 ? [0, 1] : [order[0], order[1]]) : [0, 0], view: null,
    ends: ends(), base: zero.slice(),
  };

  /* Two data to morph between at first: of different labels where there are any. */
  function ends() {
    const other = given.labels ? given.labels.findIndex((label) => label !== given.labels[0]) : -1;
    return [0, other > 0 ? other : Math.min(1, N - 1)];
  }
  /* The orthonormal directions of the plane; where there is one latent the second is nothing. */
  function directions() {
    const components = arrays[given.components];
    if (state.kind === "components") return [Array.from(row(components, 0)), Array.from(row(components, 1))];
    const [a, b] = state.axes.map((d) => zero.map((_, i) => (i === d ? 1 : 0)));
    return [a, D > 1 ? b : zero];
  }
  const onPlane = (z, [a, b] = directions()) => [dot(a, z), dot(b, z)];
  /* z moved within the plane to (u, v); what lies off the plane stays. */
  function at(u, v, z = state.z) {
    const [a, b] = directions(), [u0, v0] = onPlane(z, [a, b]);
    return moved(moved(z, u - u0, a), v - v0, b);
  }
  const names = () => state.kind === "components" ? ["principal component 1", "principal component 2"]
    : D > 1 ? state.axes.map((d) => `z${d + 1}`) : ["z1", ""];

  /* ---- The plane ---- */

  let points = [], wholes = null;
  function project() {
    const plane = directions();
    points = [];
    for (let i = 0; i < N; i++) points.push(onPlane(row(codes, i), plane));
    let low = [-2.5, -2.5], high = [2.5, 2.5];
    for (const point of points) for (const k of [0, 1]) {
      low[k] = Math.min(low[k], point[k]);
      high[k] = Math.max(high[k], point[k]);
    }
    const half = 1.06 * Math.max(high[0] - low[0], high[1] - low[1]) / 2;
    wholes = { x: (low[0] + high[0]) / 2, y: (low[1] + high[1]) / 2, half };
    state.view = { ...wholes };
  }
  const map = $("map"), pen = map.getContext("2d");
  const toScreen = ([u, v]) => {
    const size = map.clientWidth, { x, y, half } = state.view;
    return [(u - x + half) / (2 * half) * size, (y - v + half) / (2 * half) * size];
  };
  const toPlane = (left, top) => {
    const size = map.clientWidth, { x, y, half } = state.view;
    return [x - half + 2 * half * left / size, y + half - 2 * half * top / size];
  };

  function mark(context, shape, x, y, r) {
    context.beginPath();
    if (shape === "circle") context.arc(x, y, r, 0, 2 * Math.PI);
    else if (shape === "triangle") { context.moveTo(x, y - 1.3 * r); context.lineTo(x + 1.2 * r, y + r); context.lineTo(x - 1.2 * r, y + r); }
    else if (shape === "square") context.rect(x - r, y - r, 2 * r, 2 * r);
    else { context.rect(x - 1.4 * r, y - r / 2.5, 2.8 * r, r / 1.25); context.rect(x - r / 2.5, y - 1.4 * r, r / 1.25, 2.8 * r); }
    context.fill();
  }
  const labels = Object.keys(given.names), few = labels.length > 0 && labels.length <= COLOURS.length * SHAPES.length;
  const style = (label) => {
    const i = few ? labels.indexOf(String(label)) : -1;
    return i < 0 ? [GREY, "circle"] : [COLOURS[i % COLOURS.length], SHAPES[Math.floor(i / COLOURS.length)]];
  };

  function drawMap() {
    const size = map.clientWidth, dense = window.devicePixelRatio || 1;
    sized(map, Math.round(size * dense), Math.round(size * dense));
    pen.setTransform(dense, 0, 0, dense, 0, 0);
    pen.clearRect(0, 0, size, size);
    drawLines(size);
    const radius = N > 600 ? 2.6 : 3.4;
    points.forEach((point, i) => {
      const label = given.labels ? given.labels[i] : null, [colour, shape] = style(label);
      pen.globalAlpha = state.only !== null && String(label) !== state.only ? 0.08 : state.chosen !== null ? 0.45 : 0.75;
      pen.fillStyle = colour;
      mark(pen, shape, ...toScreen(point), radius);
    });
    pen.globalAlpha = 1;
    drawNumbers(size);
    if (state.chosen !== null) drawPosterior(state.chosen);
    cross(toScreen(onPlane(state.z)), "#000", 9);
    if (state.hover) cross(toScreen(onPlane(state.hover)), GREY, 6);
  }
  /* Where the lines of the axes are: [which axis, its value]. */
  function ticks() {
    const { x, y, half } = state.view, found = [];
    const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50].find((s) => 2 * half / s < 9) || 100;
    for (const [k, centre] of [[0, x], [1, y]])
      for (let n = Math.ceil((centre - half) / step); n * step <= centre + half; n++) found.push([k, n * step]);
    return { found, digits: step < 0.1 ? 2 : step < 1 ? 1 : 0 };
  }
  function drawLines(size) {
    pen.lineWidth = 1;
    for (const [k, t] of ticks().found) {
      const [left, top] = toScreen([t, t]);
      pen.strokeStyle = t === 0 ? "#a0aec0" : "#edf2f7";
      pen.beginPath();
      if (k) { pen.moveTo(0, top); pen.lineTo(size, top); } else { pen.moveTo(left, 0); pen.lineTo(left, size); }
      pen.stroke();
    }
  }
  function drawNumbers(size) {
    const { found, digits } = ticks(), [across, up] = names();
    pen.font = "12px system-ui, sans-serif";
    pen.lineWidth = 4;
    pen.lineJoin = "round";
    pen.strokeStyle = "rgba(255, 255, 255, 0.85)";
    pen.fillStyle = "#4a5568";
    const write = (text, x, y, align) => {
      pen.textAlign = align;
      pen.strokeText(text, x, y);
      pen.fillText(text, x, y);
    };
    for (const [k, t] of found) {
      const [left, top] = toScreen([t, t]);
      if (k && top > 30 && top < size - 40) write(number(t, digits), 4, top + 4, "left");
      if (!k && left > 40 && left < size - 20) write(number(t, digits), left, size - 5, "center");
    }
    write(across, size - 6, size - 22, "right");
    write(up, 6, 14, "left");
  }
  function cross([x, y], colour, r) {
    for (const [stroke, width] of [["#fff", 4], [colour, 1.6]]) {
      pen.strokeStyle = stroke;
      pen.lineWidth = width;
      pen.beginPath();
      pen.arc(x, y, r * 0.7, 0, 2 * Math.PI);
      pen.moveTo(x - r * 1.5, y); pen.lineTo(x - r * 0.5, y); pen.moveTo(x + r * 0.5, y); pen.lineTo(x + r * 1.5, y);
      pen.moveTo(x, y - r * 1.5); pen.lineTo(x, y - r * 0.5); pen.moveTo(x, y + r * 0.5); pen.lineTo(x, y + r * 1.5);
      pen.stroke();
    }
  }

  /* q(z | x) of a datum as seen on the plane: the marginal of its two coordinates. */
  function posterior(i) {
    const q = given.posterior, plane = directions(), [a, b] = plane;
    if (q.name === "point" || i >= q.count) return null;
    const own = row(arrays[q.array], i);
    if (q.name === "draws") return { cloud: Array.from({ length: own.length / D }, (_, s) => onPlane(own.subarray(s * D, (s + 1) * D), plane)) };
    const cov = q.name === "deviations" ? (s, t) => { let sum = 0; for (let d = 0; d < D; d++) sum += own[d] ** 2 * s[d] * t[d]; return sum; }
      : (s, t) => { let sum = 0; for (let d = 0; d < D; d++) sum += s[d] * dot(own.subarray(d * D, (d + 1) * D), t); return sum; };
    return { covariance: [cov(a, a), cov(a, b), cov(b, b)], mean: onPlane(row(codes, i), plane) };
  }
  function referenceOf(i) {
    if (!given.reference || i >= given.reference.count) return null;
    const own = row(arrays[given.reference.array], i), plane = directions();
    return Array.from({ length: own.length / D }, (_, s) => onPlane(own.subarray(s * D, (s + 1) * D), plane));
  }
  function drawPosterior(i) {
    const q = posterior(i);
    pen.fillStyle = ORANGE;
    for (const point of referenceOf(i) || []) mark(pen, "cross", ...toScreen(point), 2);
    pen.fillStyle = pen.strokeStyle = "#000";
    pen.lineWidth = 1.8;
    if (q && q.cloud) for (const point of q.cloud) mark(pen, "circle", ...toScreen(point), 2);
    if (q && q.covariance) for (const radius of [Math.sqrt(2 * Math.log(2)), Math.sqrt(2 * Math.log(20))]) {
      pen.beginPath();
      ellipse(q.mean, q.covariance, radius).forEach((p, k) => (k ? pen.lineTo(...toScreen(p)) : pen.moveTo(...toScreen(p))));
      pen.stroke();
    }
    const [colour, shape] = style(given.labels ? given.labels[i] : null);
    pen.fillStyle = "#fff"; mark(pen, shape, ...toScreen(points[i]), 7.5);
    pen.fillStyle = colour; mark(pen, shape, ...toScreen(points[i]), 5.5);
  }
  function nearest([u, v], within = Infinity) {
    let best = null, least = within;
    points.forEach((p, i) => {
      if (state.only !== null && String(given.labels[i]) !== state.only) return;
      const away = Math.hypot(p[0] - u, p[1] - v);
      if (away < least) [best, least] = [i, away];
    });
    return best;
  }

  /* ---- What follows from z ---- */

  let shown = null, stale = true;
  function drawImage() {
    stale = false;
    const z = state.hover || state.z, [u, v] = onPlane(z), [across, up] = names();
    shown = decode(z);
    show($("image"), shown);
    const short = (name) => name.replace("principal component", "pc");
    $("place").textContent = `${short(across)} = ${number(u)}` + (up ? `, ${short(up)} = ${number(v)}` : "");
    $("says").textContent = state.hover ? "under the pointer; a click keeps it" : D > 2
      ? "the point that stays; what is off the plane stays as it is, too" : "the point that stays";
  }
  let frame = 0;
  function redraw() {  // once per frame, however often it is asked for
    stale = true;
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(() => { if (stale) drawImage(); drawMap(); });
  }
  /* z is somewhere else: by a move on the plane, a slider, a morph ("morph") or an attribute ("attribute"). */
  function go(z, by = "") {
    state.z = z;
    state.hover = null;
    sliders.forEach(({ d, input, output }) => { input.value = z[d]; output.textContent = number(z[d]); });
    if (by !== "morph") $("morph").value = 0;
    if (by !== "attribute") {
      state.base = z.slice();
      $("factor").value = 0;
      $("factor-value").textContent = number(0, 1);
      soon(() => { drawAttribute(); drawGrid(); });
    } else soon(drawGrid);
    redraw();
  }
  function choose(i) {
    state.chosen = i;
    drawDatum();
    go(code(i));
  }
  function drawDatum() {
    const i = state.chosen;
    for (const id of ["as-start", "as-end"]) $(id).disabled = i === null;
    show($("original"), i === null ? null : datum(i));
    show($("reconstruction"), i === null ? null : decode(row(codes, i)));
    const facts = [], q = given.posterior;
    if (i !== null) {
      $("datum-name").textContent = `Test datum ${i}` + (given.labels ? `, label ${given.names[given.labels[i]]}` : "");
      if (q.name === "point") facts.push("a plain autoencoder: a point, no posterior");
      else if (i >= q.count) facts.push(`its posterior is not in this file, which has those of the first ${q.count}`);
      else if (q.name === "draws") facts.push("black dots: draws of the guide's posterior q(z | x)");
      else facts.push("ellipses: the guide's posterior q(z | x), with 50 and 95 % of its mass on this plane");
      if (given.reference && i < given.reference.count)
        facts.push("orange crosses: the exact posterior, drawn by Hamiltonian Monte Carlo" + (given.reference.converged[i] ? ""
          : ` (not converged, R-hat ${given.reference.rhat[i]}: take it with care)`));
      else if (given.reference) facts.push(`the exact posterior was drawn for the first ${given.reference.count} test data`);
    }
    $("facts").replaceChildren(...facts.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
  }

  /* ---- Grid, morph, attribute ---- */

  /* Quantiles of the prior along a direction: exact for N(0, I), of its draws otherwise. */
  function quantiles(direction) {
    const shares = Array.from({ length: SIDE }, (_, i) => (1 - REACH) / 2 + REACH * i / (SIDE - 1));
    if (dot(direction, direction) < 1e-9) return [0];
    if (given.prior.name === "normal") return shares.map(probit);
    const draws = arrays[given.prior.draws], ordered = new Float64Array(draws.shape[0]);
    for (let i = 0; i < ordered.length; i++) ordered[i] = dot(direction, row(draws, i));
    ordered.sort();
    return shares.map((share) => {
      const place = share * (ordered.length - 1), below = Math.floor(place);
      return ordered[below] + (place - below) * (ordered[Math.min(below + 1, ordered.length - 1)] - ordered[below]);
    });
  }
  function drawGrid() {
    const [across, up] = directions().map(quantiles);
    const rows = up.slice().reverse().map((v) => across.map((u) => at(u, v)));
    const [a, b] = names();
    $("grid-says").textContent = `${a} to the right${b ? `, ${b} upwards` : ""}, at equal steps of the prior's probability ` +
      `from 1 to 99 %${D > 2 ? "; the other directions stay at the present point" : ""}. A click goes there.`;
    state.grid = { across, up };
    return mosaic($("grid"), rows);
  }
  const between = (t) => { const [a, b] = state.ends.map(code); return a.map((x, i) => x + t * (b[i] - x)); };
  function drawMorph() {
    const word = (i) => `test datum ${i}` + (given.labels ? ` (${given.names[given.labels[i]]})` : "");
    $("morph-says").textContent = `From ${word(state.ends[0])} to ${word(state.ends[1])}, along the straight line between their ` +
      "codes. Choose a datum on the plane to take it as an end.";
    return mosaic($("morph-strip"), [Array.from({ length: MORPHS }, (_, i) => between(i / (MORPHS - 1)))]);
  }
  function direction(label) {
    const sums = [zero.slice(), zero.slice()], counts = [0, 0];
    for (let i = 0; i < N; i++) {
      const has = String(given.labels[i]) === label ? 1 : 0, own = row(codes, i);
      counts[has]++;
      for (let d = 0; d < D; d++) sums[has][d] += own[d];
    }
    return sums[1].map((sum, d) => sum / counts[1] - sums[0][d] / counts[0]);
  }
  const attributes = labels.length > 1;
  function drawAttribute() {
    if (!attributes) return null;
    const v = direction($("attribute").value);
    return mosaic($("attribute-strip"), [Array.from({ length: 9 }, (_, i) => moved(state.base, i - 4, v))]);
  }

  /* ---- Controls ---- */

  const sliders = [];
  const reach = Math.ceil(codes.values.reduce((most, value) => Math.max(most, Math.abs(value)), 4));
  const most = Math.max(...given.activity, 1e-9);
  function slider(d, parent) {
    const line = document.createElement("label"), name = document.createElement("span"), bar = document.createElement("i");
    const input = Object.assign(document.createElement("input"), { type: "range", min: -reach, max: reach, step: 0.02, value: 0 });
    const output = Object.assign(document.createElement("output"), { textContent: number(0) });
    line.className = "slider";
    name.textContent = `z${d + 1}`;
    name.title = `variance of the means of q over the data: ${given.activity[d]}`;
    bar.style.width = `${100 * Math.min(1, given.activity[d] / most)}%`;
    name.append(bar);
    line.append(name, input, output);
    input.addEventListener("input", () => go(state.z.map((value, i) => (i === d ? Number(input.value) : value))));
    parent.append(line);
    sliders.push({ d, input, output });
  }
  const first = order.slice(0, Math.max(1, Math.min(active.length, 12)));
  const rest = order.slice(first.length), idle = rest.filter((d) => !active.includes(d)).length;
  first.forEach((d) => slider(d, $("sliders")));
  rest.forEach((d) => slider(d, $("further-sliders")));
  $("further").hidden = !rest.length;
  $("further").firstElementChild.textContent = `${rest.length} more` +
    (idle ? `, of which ${idle} carr${idle > 1 ? "y" : "ies"} next to nothing` : "");

  function options(select, pairs, value) {
    select.replaceChildren(...pairs.map(([key, text]) => Object.assign(document.createElement("option"), { value: key, textContent: text })));
    select.value = value;
  }
  options($("kind"), [["components", "principal components"], ["latents", "two latents"]], state.kind);
  $("kind-label").hidden = D < 3;
  for (const [k, id] of [[0, "across"], [1, "up"]]) {
    options($(id), order.map((d) => [d, `z${d + 1}`]), state.axes[k]);
    $(id).addEventListener("change", () => {
      const d = Number($(id).value);
      if (state.axes[1 - k] === d) state.axes[1 - k] = state.axes[k];  // the two change places
      state.axes[k] = d;
      plane();
    });
  }
  $("kind").addEventListener("change", () => { state.kind = $("kind").value; plane(); });
  /* Another plane through the same z. */
  function plane() {
    document.querySelectorAll(".axis").forEach((label) => { label.hidden = state.kind === "components" || D < 3; });
    [$("across").value, $("up").value] = state.axes;
    state.hover = null;
    project();
    redraw();
    soon(drawGrid);
  }
  function zoom(factor, [x, y] = onPlane(state.z)) {
    state.view = { x, y, half: Math.min(4 * wholes.half, Math.max(wholes.half / 200, state.view.half * factor)) };
    redraw();
  }
  $("closer").addEventListener("click", () => zoom(0.6));
  $("wider").addEventListener("click", () => zoom(1 / 0.6));
  $("fit").addEventListener("click", () => { state.view = { ...wholes }; redraw(); });
  $("origin").addEventListener("click", () => go(zero.slice()));

  for (const label of few ? labels : []) {
    const button = Object.assign(document.createElement("button"), { type: "button" });
    const canvas = Object.assign(document.createElement("canvas"), { width: 28, height: 28 });
    const context = canvas.getContext("2d"), [colour, shape] = style(label);
    canvas.style.width = canvas.style.height = "14px";
    context.fillStyle = colour;
    mark(context, shape, 14, 14, 8);
    button.setAttribute("aria-pressed", "false");
    button.append(canvas, given.names[label]);
    button.addEventListener("click", () => {
      state.only = state.only === label ? null : label;
      for (const other of $("legend").children) other.setAttribute("aria-pressed", String(other === button && state.only !== null));
      redraw();
    });
    $("legend").append(button);
  }
  $("legend").hidden = !few;

  for (const [k, id] of [[0, "as-start"], [1, "as-end"]])
    $(id).addEventListener("click", () => { state.ends[k] = state.chosen; drawMorph(); });
  $("morph").addEventListener("input", () => go(between(Number($("morph").value)), "morph"));
  options($("attribute"), labels.map((label) => [label, given.names[label]]), labels[labels.length - 1]);
  $("attributes").hidden = !attributes;
  $("attribute").addEventListener("change", () => { go(state.base.slice()); drawAttribute(); });
  $("factor").addEventListener("input", () => {
    const t = Number($("factor").value);
    $("factor-value").textContent = number(t, 1);
    go(moved(state.base, t, direction($("attribute").value)), "attribute");
  });
  $("grid").addEventListener("click", (event) => {
    const box = $("grid").getBoundingClientRect(), { across, up } = state.grid;
    const cell = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    const column = cell((event.clientX - box.left) / box.width, across.length);
    const line = cell((event.clientY - box.top) / box.height, up.length);
    go(at(across[column], up[up.length - 1 - line]));
  });

  /* Mouse, pen and touch: a pointer that hovers shows, one that is pressed moves z; a press on a datum chooses it. */
  let pressed = null;
  const where = (event) => {
    const box = map.getBoundingClientRect();
    return toPlane(event.clientX - box.left - map.clientLeft, event.clientY - box.top - map.clientTop);
  };
  map.addEventListener("pointerdown", (event) => {
    if (event.button > 0) return;
    const point = where(event), radius = (event.pointerType === "touch" ? 1.6 : 1) * NEAR * 2 * state.view.half / map.clientWidth;
    const near = nearest(point, radius);
    pressed = { x: event.clientX, y: event.clientY, dragged: near === null };
    map.setPointerCapture(event.pointerId);
    map.focus({ preventScroll: true });
    event.preventDefault();
    if (near === null) go(at(...point)); else choose(near);
  });
  map.addEventListener("pointermove", (event) => {
    const point = where(event);
    if (pressed) {
      pressed.dragged ||= Math.hypot(event.clientX - pressed.x, event.clientY - pressed.y) > 6;
      if (pressed.dragged) go(at(...point));
    } else if (event.pointerType !== "touch") {
      state.hover = at(...point);
      redraw();
    }
  });
  for (const name of ["pointerup", "pointercancel"]) map.addEventListener(name, () => { pressed = null; });
  map.addEventListener("pointerleave", () => { if (!pressed && state.hover) { state.hover = null; redraw(); } });
  map.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const [u, v] = onPlane(state.z), step = state.view.half / 40 * (event.shiftKey ? 5 : 1);
    const keys = {
      ArrowLeft: () => go(at(u - step, v)), ArrowRight: () => go(at(u + step, v)),
      ArrowUp: () => go(at(u, v + step)), ArrowDown: () => go(at(u, v - step)),
      Enter: () => choose(nearest([u, v])), " ": () => choose(nearest([u, v])), Home: () => go(zero.slice()),
      PageDown: () => choose(state.chosen === null ? 0 : (state.chosen + 1) % N),
      PageUp: () => choose(state.chosen === null ? N - 1 : (state.chosen + N - 1) % N),
      "+": () => zoom(0.6), "-": () => zoom(1 / 0.6),
    };
    if (!(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });
  new ResizeObserver(redraw).observe(map);

  drawDatum();
  plane();
  go(zero.slice());
  drawMorph();
  window.explorer = {
    decode: (z) => Array.from(decode(z)), z: () => Array.from(state.z), pixels() { if (stale) drawImage(); return Array.from(shown); }, away, right,
    chosen: () => state.chosen, code, posterior, reference: referenceOf, direction, directions, quantiles,
    /* Where a point of the plane is seen in the window, and back. */
    screen: (u, v) => {
      const box = map.getBoundingClientRect(), [x, y] = toScreen([u, v]);
      return [x + box.left + map.clientLeft, y + box.top + map.clientTop];
    },
    hover: () => state.hover && Array.from(state.hover), points: () => points, latents: () => ({ order, active }),
    drawn: () => Promise.all([drawGrid(), drawMorph(), drawAttribute()]),
  };
}

start().catch((error) => {
  $("about").textContent = `This page could not start: ${error.message}. It needs a browser of 2023 or later.`;
  $("about").className = "bad";
});
