// The threshold explorer: pictures, detections and counts that follow three thresholds. A notebook
// draws it as a widget (anywidget calls `render`), a page calls `render` itself, without a kernel.
const EVERY = "every prompt";
const LOOKS = [["#0072b2", ""], ["#d55e00", "6 3"], ["#117733", "2 3"]]; // of a model's curve
const MARKED = [0.3, 0.5]; // thresholds that people use, on every curve

const text = (value) => String(value).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
const share = (value) => Number.isNaN(value) ? "undefined" : value.toFixed(2);
const short = (value) => String(Number(value.toPrecision(3)));
const path = (outlines) => outlines.map((xy) => {
  let d = "";
  for (let n = 0; n < xy.length; n += 2) d += (n ? "L" : "M") + xy[n] + " " + xy[n + 1];
  return d + "Z";
}).join("");

// Number of pairs with an IoU of 0.5 or more when the summed IoU of rows and columns is greatest
// (Hungarian algorithm with potentials, O(rows^2 * columns)).
function numHits(ious) {
  if (!ious.length || !ious[0].length) return 0;
  const isWide = ious[0].length >= ious.length;
  const value = isWide ? (i, j) => ious[i][j] : (i, j) => ious[j][i];
  const n = isWide ? ious.length : ious[0].length, m = isWide ? ious[0].length : ious.length;
  const u = Array(n + 1).fill(0), v = Array(m + 1).fill(0), row = Array(m + 1).fill(0);
  for (let i = 1; i <= n; i += 1) {
    const least = Array(m + 1).fill(Infinity), used = Array(m + 1).fill(false), way = Array(m + 1).fill(0);
    let j0 = 0;
    row[0] = i;
    do {
      used[j0] = true;
      let delta = Infinity, j1 = 0;
      for (let j = 1; j <= m; j += 1) if (!used[j]) {
        const cost = -value(row[j0] - 1, j - 1) - u[row[j0]] - v[j];
        if (cost < least[j]) { least[j] = cost; way[j] = j0; }
        if (least[j] < delta) { delta = least[j]; j1 = j; }
      }
      for (let j = 0; j <= m; j += 1) {
        if (used[j]) { u[row[j]] += delta; v[j] -= delta; } else least[j] -= delta;
      }
      j0 = j1;
    } while (row[j0] !== 0);
    do { const j1 = way[j0]; row[j0] = row[j1]; j0 = j1; } while (j0);
  }
  let hits = 0;
  for (let j = 1; j <= m; j += 1) if (row[j] && value(row[j] - 1, j - 1) >= 0.5) hits += 1;
  return hits;
}

// What is left of an answer without duplicates, best first, and the hits of its first 0, 1, 2, ...
function prepare(answer, mask, overlap) {
  const key = `${mask} ${overlap}`;
  if (answer.key === key) return answer;
  const level = answer.masks[mask], kept = [];
  answer.scores.forEach((_, n) => {
    if (kept.every((other) => level.overlaps[n][other] <= overlap)) kept.push(n);
  });
  const hits = [0];
  kept.forEach((_, n) => hits.push(numHits(kept.slice(0, n + 1).map((one) => level.ious[one]))));
  return Object.assign(answer, { key, kept, hits });
}

function countFrom(answer, threshold) {
  let low = 0, high = answer.kept.length; // scores fall, so the first one below is searched for
  while (low < high) {
    const middle = (low + high) >> 1;
    if (answer.scores[answer.kept[middle]] >= threshold) low = middle + 1; else high = middle;
  }
  return low;
}

function judge(questions, m, threshold) {
  let count = 0, hits = 0, objects = 0;
  for (const question of questions) {
    const answer = question.answers[m], k = countFrom(answer, threshold);
    count += k; hits += answer.hits[k]; objects += question.objects.length;
  }
  return { threshold, count, hits, objects, precision: count ? hits / count : NaN,
    recall: objects ? hits / objects : NaN, f1: count + objects ? 2 * hits / (count + objects) : NaN };
}

const calibration = ({ word, threshold, low, high }) => `calibrated for ${word}: ${short(threshold)} [${short(low)}, ${short(high)}]`;

function curve(series, x, y, label, names) {
  const isDrawn = (row) => !Number.isNaN(row[x]) && !Number.isNaN(row[y]);
  const at = (row) => [40 + 300 * row[x], 220 - 200 * row[y]];
  const lines = series.map(({ rows, now, marks, chosen }, m) => {
    const [colour, dash] = LOOKS[m % LOOKS.length], points = rows.filter(isDrawn).map((row) => at(row).join(" "));
    const dots = marks.filter(isDrawn).map((row) => `<circle cx="${at(row)[0]}" cy="${at(row)[1]}" r="4" fill="#fff" stroke="${colour}"><title>threshold ${row.threshold}</title></circle>`
      + `<text x="${at(row)[0] + 6}" y="${at(row)[1] - 5}" font-size="11">${row.threshold}</text>`);
    // The calibrated threshold, a diamond, and on the axis of thresholds its interval, a band.
    const diamonds = chosen.filter(isDrawn).map((row) => {
      const [left, top] = at(row), side = left > 200 ? -1 : 1, from = 40 + 300 * row.low, to = 40 + 300 * row.high;
      return (x === "threshold" ? `<rect class="interval" x="${from}" y="20" width="${Math.max(to - from, 1)}" height="200"/>` : "")
        + `<path class="calibrated-mark" d="M${left} ${top - 7}l7 7l-7 7l-7 -7Z"><title>${text(calibration(row))}</title></path>`
        + `<text x="${left + 10 * side}" y="${top + 16}" font-size="11" text-anchor="${side < 0 ? "end" : "start"}">${text(row.word)} ${short(row.threshold)}</text>`;
    });
    return diamonds.join("") + (points.length ? `<path d="M${points.join("L")}" fill="none" stroke="${colour}" stroke-width="2" stroke-dasharray="${dash}"/>` : "") + dots.join("")
      + (isDrawn(now) ? `<rect x="${at(now)[0] - 5}" y="${at(now)[1] - 5}" width="10" height="10" fill="${colour}"/>` : "")
      + (names.length > 1 ? `<text x="338" y="${32 + 15 * m}" font-size="12" text-anchor="end" fill="${colour}">${text(names[m])} ${dash ? "- -" : "—"}</text>` : "");
  });
  return `<svg viewBox="0 0 360 250" role="img" aria-label="${label}"><path d="M40 20V220H340" fill="none" stroke="#333"/>${lines.join("")}`
    + `<text x="190" y="243" text-anchor="middle" font-size="13">${x}</text><text x="14" y="120" font-size="13" transform="rotate(-90 14 120)" text-anchor="middle">${y}</text>`
    + `<text x="36" y="26" font-size="11" text-anchor="end">1</text><text x="36" y="222" font-size="11" text-anchor="end">0</text><text x="340" y="234" font-size="11" text-anchor="end">1</text></svg>`;
}

function strip(series, lowest, threshold, names) {
  const decades = -Math.log10(lowest), x = (score) => 40 + 300 * (1 + Math.log10(Math.max(score, lowest)) / decades);
  const band = 180 / series.length;
  const dots = series.map(({ scores }, m) => scores.map((s, n) => `<circle cx="${x(s)}" cy="${34 + m * band + (n * 37) % (band - 12)}" r="2.5" fill="${s >= threshold ? "#d55e00" : "#999"}"/>`).join("")
    + (names.length > 1 ? `<text x="44" y="${30 + m * band}" font-size="11">${text(names[m])}</text>` : ""));
  let ticks = "";
  for (let d = 0; d <= decades + 1e-9; d += decades > 3 ? 2 : 1) ticks += `<text x="${x(10 ** -d)}" y="236" font-size="11" text-anchor="middle">${Number((10 ** -d).toPrecision(1))}</text>`;
  return `<svg viewBox="0 0 360 250" role="img" aria-label="scores of all detections"><path d="M40 220H340" stroke="#333"/>${dots.join("")}${ticks}`
    + `<path d="M${x(threshold)} 20V220" stroke="#000" stroke-width="2"/><text x="190" y="15" font-size="13" text-anchor="middle">score of each detection; the line is the threshold</text></svg>`;
}

const CONTROLS = `
<div class="controls">
<label><span>score threshold (logarithmic)</span><input type="range" class="score" step="0.005"><input type="text" inputmode="decimal" class="score-value" aria-label="score threshold, number"></label>
<label><span>mask threshold (probability)</span><input type="range" class="mask" step="1" min="0"><output class="mask-value"></output></label>
<label><span>overlap from which a duplicate is dropped (IoU)</span><input type="range" class="overlap" step="0.05" min="0.05" max="1"><output class="overlap-value"></output></label>
<label><span>prompt</span><select class="prompt"></select><span></span></label>
</div>
<p class="goals"><button data-goal="f1">best F1</button><button data-goal="precision">precision &ge; 0.9</button><button data-goal="recall">recall &ge; 0.9</button> <span class="source"></span></p>
<p><label><input type="checkbox" class="objects" checked> objects</label> <label><input type="checkbox" class="below"> dropped detections</label>
<label class="ordering">order of pictures <select class="order"><option value="-1">worst first</option><option value="1">best first</option><option value="0">as in the file</option></select></label></p>
<p class="key"><svg><path class="object" d="M2 6H46"/></svg> object <svg><path class="hit" d="M2 6H46"/></svg> detection kept <svg><path class="below" d="M2 6H46"/></svg> detection dropped</p>
<div class="numbers" aria-live="polite"></div><div class="plots"></div><p class="calibrated"></p><div class="pictures no-below"></div>`;

function render({ model, el }) {
  const data = model.get("content"), root = document.createElement("div");
  root.className = "explorer";
  root.innerHTML = CONTROLS;
  el.append(root);
  const find = (name) => root.querySelector(`.${name}`);
  const models = data.models, lowest = data.lowest, questions = data.images.flatMap((image) => image.questions);
  const masks = data.masks; // thresholds that were computed
  for (const prompt of [EVERY, ...new Set(questions.map((q) => q.prompt))]) find("prompt").add(new Option(prompt, prompt));
  Object.assign(find("score"), { min: Math.log10(lowest), max: 0 });
  Object.assign(find("mask"), { max: masks.length - 1 });
  find("mask").closest("label").hidden = masks.length < 2;
  find("goals").hidden = !questions.some((q) => q.objects.length) || data.images.length < 2;
  find("order").closest("label").hidden = data.images.length < 2;
  find("plots").classList.toggle("alone", data.images.length < 2);

  const get = (name) => model.get(name);
  const distance = (n) => Math.abs(masks[n] - get("mask_threshold"));
  const mask = () => masks.reduce((a, _, n) => distance(n) < distance(a) ? n : a, 0); // the nearest
  const isAsked = (question) => get("prompt") === EVERY || question.prompt === get("prompt");

  // Every outline is made once; a slider changes the class of those that it passes, or their path.
  const cards = data.images.map((image) => {
    const figure = document.createElement("figure");
    const svgs = models.map((_, m) => {
      const groups = image.questions.map((question) => "<g>" + question.objects.map((o) => `<path class="object" d="${path(o)}"/>`).join("")
        + question.answers[m].scores.map((score) => `<path class="below"><title>${text(question.prompt)} ${score.toPrecision(3)}</title></path>`).join("") + "</g>");
      return `<svg viewBox="0 0 ${image.width} ${image.height}" role="img" aria-label="${text(image.name)}, ${text(models[m])}">`
        + `<image href="${image.source}" width="${image.width}" height="${image.height}"/>${groups.join("")}</svg>`;
    });
    figure.innerHTML = `<div class="beside">${svgs.join("")}</div><figcaption></figcaption>`;
    find("pictures").append(figure);
    figure.querySelectorAll("svg").forEach((svg, m) => svg.querySelectorAll("g").forEach((group, n) => {
      const answer = image.questions[n].answers[m];
      Object.assign(answer, { group, paths: [...group.querySelectorAll(".below")], classes: [], drawnMask: null });
    }));
    return { figure, caption: figure.querySelector("figcaption"), words: "" };
  });

  function fill(image, card) {
    const lines = [], level = mask(), overlap = get("overlap_threshold");
    let faults = 0;
    for (const question of image.questions) question.answers.forEach((answer, m) => {
      prepare(answer, level, overlap);
      if (answer.drawnMask !== level) {
        answer.paths.forEach((one, n) => one.setAttribute("d", path(answer.masks[level].outlines[n])));
        answer.drawnMask = level;
      }
      const k = countFrom(answer, get("score_threshold")), kept = new Set(answer.kept.slice(0, k));
      answer.paths.forEach((one, n) => {
        const name = kept.has(n) ? "hit" : "below";
        if (answer.classes[n] !== name) one.setAttribute("class", name);
        answer.classes[n] = name;
      });
      answer.group.style.display = isAsked(question) ? "" : "none";
      if (!isAsked(question)) return;
      faults += k - answer.hits[k] + question.objects.length - answer.hits[k];
      if (!k && !question.objects.length && image.questions.length > 1) return;
      const factors = answer.presence === null ? "" : `, best score ${short(answer.best * answer.presence)} = presence ${short(answer.presence)} × query ${short(answer.best)}`;
      const known = question.objects.length ? `${question.objects.length} annotated, ${k} detected, ${answer.hits[k]} right` : `${k || "nothing"} detected at ${short(get("score_threshold"))}`;
      lines.push(`${models.length > 1 ? `<i>${text(models[m])}</i>, ` : ""}${text(question.prompt)}: ${known}${factors}`);
    });
    const words = lines.join("<br>") || "nothing annotated, nothing detected";
    if (words !== card.words) card.caption.innerHTML = `<b>${text(image.name)}</b><br>${words}`;
    card.words = words;
    card.figure.dataset.faults = faults;
    card.figure.style.order = find("order").value * faults;
    card.figure.hidden = !image.questions.some(isAsked);
  }

  // A panel holds no detection below its lowest score, so a count from there would be another one.
  const isBelow = (threshold) => threshold < lowest * (1 - 1e-9);
  function mark(problem) {
    find("score-value").classList.toggle("bad", problem !== "");
    find("score-value").setAttribute("aria-invalid", problem !== "");
    find("score-value").title = problem;
  }
  const problemOf = (threshold) => isBelow(threshold) ? `no detection below a score of ${lowest} was kept: a number from ${lowest} to 1` : "";

  const goalRows = () => data.validation?.[get("prompt")]; // where a threshold may be chosen
  let swept = "", series = [];
  function sweep() {
    const key = [mask(), get("overlap_threshold"), get("prompt")].join(" ");
    if (key === swept) return;
    swept = key;
    const asked = questions.filter(isAsked);
    series = models.map((_, m) => {
      for (const question of asked) prepare(question.answers[m], mask(), get("overlap_threshold"));
      const scores = asked.flatMap(({ answers }) => answers[m].kept.map((n) => answers[m].scores[n])).sort((a, b) => a - b);
      const step = Math.max(1, Math.floor(scores.length / 150)), cuts = scores.filter((_, n) => n % step === 0);
      const rows = [...new Set([lowest, ...cuts, 1])].map((t) => judge(asked, m, t));
      const chosen = m ? [] : Object.entries(data.calibrated ?? {}).filter(([word]) => asked.some((q) => q.prompt === word))
        .map(([word, { threshold, low, high }]) => ({ ...judge(asked, m, threshold), word, low, high }));
      return { scores, rows, chosen, marks: MARKED.map((t) => judge(asked, m, t)) };
    });
  }

  function draw() {
    const started = performance.now(), threshold = get("score_threshold"), level = mask();
    sweep();
    const asked = questions.filter(isAsked);
    series.forEach((one, m) => { one.now = judge(asked, m, threshold); });
    find("score").value = Math.log10(Math.max(threshold, lowest));
    if (document.activeElement !== find("score-value")) {
      find("score-value").value = short(threshold);
      mark(problemOf(threshold));
    }
    root.classList.toggle("nothing", isBelow(threshold));
    find("mask").value = level;
    find("mask-value").textContent = masks[level];
    find("overlap").value = get("overlap_threshold");
    find("overlap-value").textContent = get("overlap_threshold") < 1 ? get("overlap_threshold").toFixed(2) : "off";
    find("prompt").value = get("prompt");
    const why = goalRows() ? "" : data.validation ? `${get("prompt")} was not asked on the validation split, so no threshold can be chosen for it.`
      : "A threshold chosen on the pictures that it is judged on flatters. Choose it on the validation split: calibrate, or report --html; in a notebook, explorer_panel(..., validation=...).";
    find("source").textContent = why || "chosen on the validation split";
    for (const button of root.querySelectorAll("button[data-goal]")) Object.assign(button, { disabled: why !== "", title: why });
    const objects = series.some(({ now }) => now.objects);
    if (isBelow(threshold)) {
      find("numbers").textContent = `at ${short(threshold)} nothing is shown: ${problemOf(threshold)}`;
      return;
    }
    find("numbers").innerHTML = series.map(({ now }, m) => `<p>${models.length > 1 ? `${text(models[m])}, ` : ""}at ${short(threshold)}: ${now.count} detections`
      + (objects ? `, ${now.hits} of ${now.objects} objects found; precision ${share(now.precision)}, recall ${share(now.recall)}, F1 ${share(now.f1)} (a pair counts from an IoU of 0.5)` : "") + "</p>").join("");
    find("plots").innerHTML = (objects ? curve(series, "recall", "precision", "precision against recall", models) + curve(series, "threshold", "f1", "F1 against threshold", models) : "")
      + strip(series, lowest, threshold, models);
    const chosen = objects ? series[0].chosen.map(calibration).join("; ") : "";
    find("calibrated").textContent = chosen && `Diamond: ${chosen}. In brackets, and as a band, the 95 % interval of a bootstrap over validation pictures.`;
    data.images.forEach((image, n) => fill(image, cards[n]));
    root.dataset.milliseconds = (performance.now() - started).toFixed(1);
  }

  // The score threshold that was last set for each prompt, shown in the list beside the prompt.
  const own = {};
  function keep() {
    own[get("prompt")] = get("score_threshold");
    for (const option of find("prompt").options)
      if (option.value in own) option.text = `${option.value} (${short(own[option.value])})`;
  }
  function ask(prompt) {
    find("score-value").blur(); // while it has the focus its text is the user's
    set("prompt", prompt);
    if (prompt in own) set("score_threshold", own[prompt]);
  }

  function set(name, value) {
    model.set(name, value);
    model.save_changes();
    if (name === "score_threshold") keep();
    draw();
  }
  find("score").addEventListener("input", (event) => set("score_threshold", Math.max(lowest, 10 ** Number(event.target.value)))); // its end is rounded
  find("score-value").addEventListener("input", (event) => {
    const typed = event.target.value.trim().replace(",", "."), value = Number(typed);
    const problem = typed !== "" && value >= 0 && value <= 1 ? problemOf(value) : `a number from ${lowest} to 1`;
    mark(problem);
    if (!problem) set("score_threshold", value);
  });
  find("mask").addEventListener("input", (event) => set("mask_threshold", masks[Number(event.target.value)]));
  find("overlap").addEventListener("input", (event) => set("overlap_threshold", Number(event.target.value)));
  find("prompt").addEventListener("change", (event) => ask(event.target.value));
  find("order").addEventListener("change", draw);
  for (const name of ["objects", "below"])
    find(name).addEventListener("change", (event) => find("pictures").classList.toggle(`no-${name}`, !event.target.checked));
  for (const button of root.querySelectorAll("button[data-goal]")) button.addEventListener("click", () => {
    const goal = button.dataset.goal, reached = goalRows().filter((row) => goal === "f1" ? row.f1 > 0 : row[goal] >= 0.9);
    // Of those that reach it, the one that costs the least of the other.
    const other = { f1: "f1", precision: "recall", recall: "precision" }[goal];
    if (reached.length) set("score_threshold", reached.reduce((a, b) => b[other] > a[other] ? b : a).threshold);
    else find("numbers").textContent = `no threshold reaches ${goal === "f1" ? "any object" : `${goal} 0.9`}`;
  });
  for (const name of ["score_threshold", "mask_threshold", "overlap_threshold", "prompt"]) model.on(`change:${name}`, draw);
  model.on("change:score_threshold", keep);
  keep();
  draw();
}

export default { render };
