"use strict";
(() => {
  const data = JSON.parse(document.getElementById("cases-data").textContent);
  const DRAWN = 420; // canvas pixels across a slice, at least
  const STEPS = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity };
  const DRAG = 6; // screen pixels per slice

  async function unpacked(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer());
  }

  // The outline of what `inside` is true of, along the edges of pixels, as closed lines.
  function outline(width, height, inside, scaleX, scaleY) {
    const next = new Map(), key = (x, y) => y * (width + 1) + x;
    const edge = (x0, y0, x1, y1) => { const from = key(x0, y0); next.has(from) ? next.get(from).push(key(x1, y1)) : next.set(from, [key(x1, y1)]); };
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
      if (!inside(x, y)) continue;
      if (y === 0 || !inside(x, y - 1)) edge(x, y, x + 1, y);
      if (x === width - 1 || !inside(x + 1, y)) edge(x + 1, y, x + 1, y + 1);
      if (y === height - 1 || !inside(x, y + 1)) edge(x + 1, y + 1, x, y + 1);
      if (x === 0 || !inside(x - 1, y)) edge(x, y + 1, x, y);
    }
    const path = new Path2D(), across = width + 1;
    for (const start of next.keys()) {
      while (next.get(start).length) {
        path.moveTo((start % across) * scaleX, Math.floor(start / across) * scaleY);
        let at = start;
        do {
          at = next.get(at).pop();
          if (at !== start) path.lineTo((at % across) * scaleX, Math.floor(at / across) * scaleY);
        } while (at !== start);
        path.closePath();
      }
    }
    return path;
  }

  class Viewer {
    constructor(root, found) {
      this.root = root;
      this.found = found;
      this.slider = root.querySelector("input[type=range]");
      this.canvases = [...root.querySelectorAll("canvas")];
      this.scale = Math.max(2, Math.ceil(DRAWN / found.width));
      for (const canvas of this.canvases) {
        canvas.width = found.width * this.scale;
        canvas.height = Math.round(found.height * this.scale * found.aspect);
      }
      this.images = data.sequences.map((name) => {
        const image = new Image();
        image.onload = () => this.draw();
        image.src = found.images[name];
        return image;
      });
      this.labels = new Map(); // unpacked once
      this.listen();
      this.begin();
    }

    get run() { return this.root.querySelector(".run")?.value ?? Object.keys(this.found.predictions)[0]; }
    get subset() { return data.subsets[this.root.querySelector(".subset").value]; }

    async begin() {
      this.truth = await unpacked(this.found.truth);
      const areas = this.areas(this.truth);
      this.slider.value = areas.some(Boolean) ? areas.indexOf(Math.max(...areas)) : this.found.slices >> 1;
      await this.choose();
    }

    listen() {
      const slices = this.root.querySelector(".slices");
      this.slider.addEventListener("input", () => this.draw());
      for (const choice of this.root.querySelectorAll("select")) choice.addEventListener("change", () => this.choose());
      for (const box of this.root.querySelectorAll("input[type=checkbox]")) box.addEventListener("change", () => this.draw());
      slices.addEventListener("keydown", (event) => {
        const box = { t: ".truth", p: ".predicted" }[event.key];
        if (box) this.root.querySelector(box).click();
        if (event.key in STEPS) {
          event.preventDefault();
          this.move(STEPS[event.key]);
        }
      });
      slices.addEventListener("wheel", (event) => {
        if (document.activeElement !== slices) return; // the page scrolls until the images are selected
        event.preventDefault();
        this.move(-Math.sign(event.deltaY));
      }, { passive: false });
      slices.addEventListener("pointerdown", (event) => {
        slices.setPointerCapture(event.pointerId);
        this.grabbed = { at: event.clientX - event.clientY, slice: Number(this.slider.value) };
      });
      slices.addEventListener("pointermove", (event) => {
        if (!this.grabbed) return;
        this.show(this.grabbed.slice + Math.round((event.clientX - event.clientY - this.grabbed.at) / DRAG));
      });
      for (const end of ["pointerup", "pointercancel"]) slices.addEventListener(end, () => { this.grabbed = null; });
    }

    move(step) { this.show(Number(this.slider.value) + step); }

    show(slice) {
      this.slider.value = Math.min(Math.max(slice, 0), this.found.slices - 1);
      this.draw();
    }

    async choose() {
      const run = this.run, { name, given } = this.subset, key = `${run}/${name}`;
      if (!this.labels.has(key)) this.labels.set(key, await unpacked(this.found.predictions[run][name]));
      this.predicted = this.labels.get(key);
      this.canvases.forEach((canvas, number) => canvas.parentElement.classList.toggle("unknown", !given[number]));
      const scores = this.found.dice[run][name] ?? this.found.dice[run].present ?? {};
      this.root.querySelectorAll(".dice").forEach((place, number) => {
        const dice = scores[data.regions[number].name];
        place.textContent = dice === undefined ? "" : (100 * dice).toFixed(1);
      });
      this.drawAreas();
      this.draw();
    }

    areas(labels) {
      const size = this.found.width * this.found.height;
      return Array.from({ length: this.found.slices }, (_, k) => labels.subarray(k * size, (k + 1) * size).reduce((sum, value) => sum + (value > 0), 0));
    }

    drawAreas() {
      const [truth, predicted] = [this.areas(this.truth), this.areas(this.predicted)], top = Math.max(1, ...truth, ...predicted), last = this.found.slices - 1;
      const line = (areas) => areas.map((area, k) => `${k},${(20 - (19 * area) / top).toFixed(2)}`).join(" ");
      const strip = this.root.querySelector(".areas");
      strip.setAttribute("viewBox", `0 0 ${last} 20`);
      strip.innerHTML = `<polygon class="true" points="0,20 ${line(truth)} ${last},20"/><polyline class="guess" points="${line(predicted)}"/>`;
    }

    draw() {
      if (!this.predicted) return;
      const { width, height, columns, tile, slices } = this.found, k = Number(this.slider.value);
      this.root.querySelector("output").textContent = `slice ${k + 1} of ${slices}`;
      this.slider.setAttribute("aria-valuetext", `slice ${k + 1} of ${slices}`);
      const outlines = this.outlines(k);
      this.canvases.forEach((canvas, number) => {
        const context = canvas.getContext("2d"), image = this.images[number];
        if (!image.complete) return;
        context.drawImage(image, (k % columns) * tile[0], Math.floor(k / columns) * tile[1], width, height, 0, 0, canvas.width, canvas.height);
        for (const { path, colour, dash } of outlines) {
          context.setLineDash(dash);
          for (const [style, thick] of [["rgba(0, 0, 0, .5)", 4.6], [colour, 3]]) {
            context.strokeStyle = style;
            context.lineWidth = thick;
            context.stroke(path);
          }
        }
      });
    }

    outlines(k) {
      const { width, height, aspect } = this.found, start = k * width * height, found = [];
      const shown = [[".predicted", this.predicted, "predicted", []], [".truth", this.truth, "truth", [7, 5]]];
      for (const [box, labels, side, dash] of shown) {
        if (!this.root.querySelector(box).checked) continue;
        data.regions.forEach((region, number) => {
          if (!this.root.querySelector(`[data-region="${number}"]`).checked) return;
          const inside = (x, y) => region[side].includes(labels[start + y * width + x]);
          found.push({ path: outline(width, height, inside, this.scale, this.scale * aspect), colour: region.colour, dash });
        });
      }
      return found;
    }
  }

  document.querySelectorAll(".viewer").forEach((root, number) => new Viewer(root, data.cases[number]));
})();
