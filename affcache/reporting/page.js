"use strict";
// Draws timelines, each of one video at a time, and lets crops be filtered. All text goes in as text, never as markup.
function timelineOf(part) {
  const one = (name) => part.querySelector(`.${name}`);
  const data = JSON.parse(one("frames").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const numbers = new Int32Array(bytes(data.numbers).buffer);
  const seconds = data.seconds && new Float64Array(bytes(data.seconds).buffer);
  for (const said of data.tasks)
    for (const name of ["probabilities", "decided", "labels", "labelled"]) said[name] = said[name] === null ? null : bytes(said[name]);
  let task = data.tasks[0];
  const canvas = one("timeline"), pen = canvas.getContext("2d");
  const chooser = one("video"), slider = one("position");
  const ofTask = one("task"), readout = one("readout");
  const colour = (row) => data.colours[row % data.colours.length];
  let video = null, first = 0, span = 1, cursor = -1; // first and span in frame numbers, cursor an index into all frames

  data.tasks.forEach((one, index) => ofTask.add(new Option(one.name, index)));
  ofTask.hidden = data.tasks.length < 2;
  data.videos.forEach((one, index) => chooser.add(new Option(`${one.name} (${one.count} ${one.count === 1 ? "frame" : "frames"})`, index)));

  function lastNumber() { return numbers[video.start + video.count - 1]; }
  function show(index, position = -1) {
    video = data.videos[index];
    chooser.value = index;
    first = numbers[video.start];
    span = lastNumber() - first + 1;
    cursor = position;
    if (position >= 0) { span = Math.min(span, 240); first = numbers[position] - span / 2; }
    draw();
  }
  function clamp() {
    const whole = lastNumber() - numbers[video.start] + 1;
    span = Math.min(Math.max(span, 12), Math.max(whole, 12));
    first = Math.max(numbers[video.start], Math.min(first, numbers[video.start] + Math.max(whole, 12) - span));
    slider.min = numbers[video.start];
    slider.max = Math.max(numbers[video.start], Math.ceil(numbers[video.start] + whole - span));
    slider.value = first;
  }
  function indexAt(number) { // the first frame of the video with at least this number
    let low = video.start, high = video.start + video.count;
    while (low < high) { const middle = (low + high) >> 1; numbers[middle] < number ? (low = middle + 1) : (high = middle); }
    return low;
  }
  function isLabel(index, row, of) { return task.kind === "classes" ? of[index] === row : of[index * task.classes.length + row] > 0; }
  function hasLabel(index, row) { return task.labelled === null || task.labelled[task.kind === "classes" ? index : index * task.classes.length + row] > 0; }
  function choose(index) {
    task = data.tasks[index];
    const count = task.classes.length;
    canvas.style.height = `${Math.max(Math.min(10 * count, 20), 1.6 * count)}rem`;
  }

  function draw() {
    clamp();
    const scale = window.devicePixelRatio || 1, count = task.classes.length, { probabilities, decided, labels } = task;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * scale;
    canvas.height = height * scale;
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    const fore = getComputedStyle(document.body).color;
    pen.clearRect(0, 0, width, height);
    const left = Math.min(90, width * 0.25), plot = width - left - 4, rowHeight = (height - 18) / count;
    const x = (number) => left + ((number - first) / span) * plot;
    pen.font = "12px system-ui, sans-serif";
    pen.textBaseline = "middle";
    const begin = indexAt(first), end = Math.min(indexAt(first + span) + 1, video.start + video.count);
    const cell = Math.max(1, plot / span);
    for (let row = 0; row < count; row++) {
      const top = row * rowHeight;
      pen.fillStyle = fore;
      pen.fillText(task.classes[row], 2, top + rowHeight / 2, left - 6);
      if (task.kind === "values") { drawValues(row, top, rowHeight, begin, end, x, fore); continue; }
      for (let pixel = -1, best = 0, index = begin; index <= end; index++) { // the largest of the frames on a pixel
        const at = index < end ? Math.floor(x(numbers[index])) : Infinity;
        if (at !== pixel && pixel >= 0 && best) {
          pen.globalAlpha = best / 255;
          pen.fillStyle = colour(row);
          pen.fillRect(pixel, top + 1, Math.max(1, Math.min(at, pixel + Math.ceil(cell)) - pixel), rowHeight - 7);
          best = 0;
        }
        pixel = at;
        if (index < end) best = Math.max(best, probabilities[index * count + row]);
      }
      pen.globalAlpha = 1;
      for (let index = begin; index < end; index++) {
        if (isLabel(index, row, labels || decided)) { pen.fillStyle = fore; pen.fillRect(x(numbers[index]), top + rowHeight - 5, cell + 0.5, 3); }
      }
    }
    pen.fillStyle = fore;
    pen.fillText(String(Math.round(first)), left, height - 8);
    const label = String(Math.max(Math.round(first + span - 1), Math.round(first)));
    pen.fillText(label, width - 4 - pen.measureText(label).width, height - 8);
    if (cursor >= 0) { pen.fillRect(x(numbers[cursor]) + cell / 2, 0, 1.5, height - 18); tell(cursor); }
  }
  function drawValues(row, top, rowHeight, begin, end, x, fore) {
    const y = (value) => top + 4 + (1 - value / 255) * (rowHeight - 8);
    for (const [of, stroke] of [[task.labels, fore], [task.probabilities, colour(row)]]) {
      if (of === null) continue;
      pen.strokeStyle = stroke;
      pen.lineWidth = 1.5;
      pen.lineCap = "round"; // a label between two gaps is a dot
      pen.beginPath();
      for (let index = begin, drawn = false; index < end; index++) {
        const there = of !== task.labels || hasLabel(index, row), at = [x(numbers[index]), y(of[index * task.classes.length + row])];
        if (there && !drawn) pen.moveTo(...at);
        if (there) pen.lineTo(...at);
        drawn = there;
      }
      pen.stroke();
    }
  }
  function named(index, of) {
    const at = (row) => of[index * task.classes.length + row] / 255, [low, high] = task.range;
    const there = (row) => of !== task.labels || hasLabel(index, row);
    if (task.kind === "values") return task.classes.map((name, row) => `${name} ${there(row) ? (low + at(row) * (high - low)).toFixed(2) : "-"}`).join(", ");
    const gaps = task.classes.filter((_, row) => !there(row)), words = task.classes.filter((_, row) => isLabel(index, row, of)).join(", ") || "none";
    return gaps.length ? `${words} (not labelled: ${gaps.join(", ")})` : words;
  }
  function leading(index) { // the most probable outputs, where there is no label to read out instead
    const at = (row) => task.probabilities[index * task.classes.length + row] / 255;
    const rows = [...task.classes.keys()].sort((one, other) => at(other) - at(one)).slice(0, 3);
    return rows.map((row) => `${task.classes[row]} ${at(row).toFixed(2)}`).join(", ");
  }
  function tell(index) {
    const time = seconds && !Number.isNaN(seconds[index]) ? `, ${seconds[index].toFixed(2)} s` : "";
    const label = task.labels === null ? "" : `label ${named(index, task.labels)}; `;
    const probable = task.labels === null && task.kind !== "values" ? `; ${leading(index)}` : "";
    readout.textContent = `frame ${numbers[index]}${time}: ${label}decided ${named(index, task.decided)}${probable}`;
  }
  function move(share) { first += span * share; draw(); }
  function zoom(factor, around = first + span / 2) { first = around - (around - first) * factor; span *= factor; draw(); }
  function step(by) {
    cursor = cursor < 0 ? indexAt(first) : Math.max(video.start, Math.min(cursor + by, video.start + video.count - 1));
    if (numbers[cursor] < first || numbers[cursor] > first + span) first = numbers[cursor] - span / 2;
    draw();
  }
  function numberAt(event) {
    const box = canvas.getBoundingClientRect(), left = Math.min(90, box.width * 0.25);
    return first + ((event.clientX - box.left - left) / (box.width - left - 4)) * span;
  }

  ofTask.addEventListener("change", () => { choose(Number(ofTask.value)); draw(); });
  chooser.addEventListener("change", () => show(Number(chooser.value)));
  slider.addEventListener("input", () => { first = Number(slider.value); draw(); });
  for (const [id, act] of [["in", () => zoom(0.5)], ["out", () => zoom(2)], ["back", () => move(-0.5)], ["on", () => move(0.5)]])
    one(id).addEventListener("click", act);
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && Math.abs(event.deltaX) <= Math.abs(event.deltaY) && !event.shiftKey) return; // the page scrolls
    event.preventDefault();
    event.ctrlKey ? zoom(event.deltaY > 0 ? 1.25 : 0.8, numberAt(event)) : move((event.deltaX || event.deltaY) / 800);
  }, { passive: false });
  canvas.addEventListener("click", (event) => {
    cursor = Math.min(indexAt(Math.floor(numberAt(event))), video.start + video.count - 1);
    draw();
  });
  canvas.addEventListener("keydown", (event) => {
    const act = { ArrowLeft: () => step(-1), ArrowRight: () => step(1), PageUp: () => move(-0.8), PageDown: () => move(0.8),
      "+": () => zoom(0.5), "-": () => zoom(2), Home: () => { cursor = video.start; step(0); },
      End: () => { cursor = video.start + video.count - 1; step(0); } }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  for (const button of part.querySelectorAll(".crops button")) {
    button.addEventListener("click", () => {
      const position = Number(button.dataset.position);
      show(data.videos.findIndex((one) => position < one.start + one.count), position);
      canvas.scrollIntoView({ block: "center" });
      canvas.focus({ preventScroll: true });
    });
  }
  const filter = one("filter");
  if (filter) filter.addEventListener("change", () => {
    let shown = 0;
    for (const button of part.querySelectorAll(".hardest button")) {
      button.hidden = filter.value !== "" && !button.dataset.classes.split("|").includes(filter.value);
      shown += button.hidden ? 0 : 1;
    }
    one("shown").textContent = `${shown} ${shown === 1 ? "frame" : "frames"}`;
  });
  window.addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  choose(0);
  show(0);
}
for (const part of document.querySelectorAll("article")) if (part.querySelector(".timeline")) timelineOf(part);
