// The picture viewer of an OmniLatent report. Without this script the page shows all pictures, unmagnified.
// - one magnified window (zoom z, left x, top y in percent) shared by every picture, kept in CSS variables
// - error maps and the blink to the original are painted on a canvas above each reconstruction
// - a strip of thumbnails chooses the picture; "Show all" lists them below each other
"use strict";
(() => {
  const viewer = document.getElementById("viewer");
  if (!viewer) return;
  const rows = [...viewer.querySelectorAll(".row")];
  const output = viewer.querySelector("output");
  const legend = viewer.querySelector(".legend");
  const heat = (viewer.dataset.heat.match(/.{6}/g) || []).map((c) => [0, 2, 4].map((i) => parseInt(c.substr(i, 2), 16)));
  const scale = Number(viewer.dataset.scale);
  const state = { z: 1, x: 0, y: 0, view: "picture", current: 0, all: false };
  viewer.classList.add("live");

  const clamp = (v, low, high) => Math.min(high, Math.max(low, v));
  const shownRow = () => rows[state.current];

  function renderWindow() {
    const most = 100 * (1 - 1 / state.z);
    state.x = clamp(state.x, 0, most);
    state.y = clamp(state.y, 0, most);
    viewer.style.setProperty("--z", state.z);
    viewer.style.setProperty("--x", state.x);
    viewer.style.setProperty("--y", state.y);
    viewer.classList.toggle("zoomed", state.z > 1);
    for (const b of viewer.querySelectorAll("button[data-zoom]"))
      b.setAttribute("aria-pressed", String(Number(b.dataset.zoom) === Math.round(state.z * 10) / 10));
    const image = shownRow() && shownRow().querySelector("img");
    if (!image) return;
    const column = Math.round(((state.x + 50 / state.z) / 100) * image.getAttribute("width"));
    const line = Math.round(((state.y + 50 / state.z) / 100) * image.getAttribute("height"));
    output.textContent = state.z > 1 ? `${Math.round(state.z * 10) / 10}× around pixel ${column}, ${line}` : "whole picture";
  }

  // Zoom to z so that the spot at (fx, fy), as fractions of the tile, stays where it is; or comes to the middle.
  function zoomAt(z, fx, fy, toMiddle) {
    const px = state.x + (100 * fx) / state.z, py = state.y + (100 * fy) / state.z;
    state.z = clamp(z, 1, 32);
    state.x = px - (toMiddle ? 50 : 100 * fx) / state.z;
    state.y = py - (toMiddle ? 50 : 100 * fy) / state.z;
    renderWindow();
  }

  function pixels(image) {
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return context.getImageData(0, 0, canvas.width, canvas.height);
  }

  function paintError(canvas, original, image) {
    const a = pixels(original), b = pixels(image), context = canvas.getContext("2d");
    const out = context.createImageData(a.width, a.height);
    for (let i = 0; i < a.data.length; i += 4) {
      const error = (Math.abs(a.data[i] - b.data[i]) + Math.abs(a.data[i + 1] - b.data[i + 1]) +
        Math.abs(a.data[i + 2] - b.data[i + 2])) / 3;
      const colour = heat[Math.min(heat.length - 1, Math.round((error / scale) * (heat.length - 1)))];
      out.data[i] = colour[0]; out.data[i + 1] = colour[1]; out.data[i + 2] = colour[2]; out.data[i + 3] = 255;
    }
    context.putImageData(out, 0, 0);
  }

  async function overlay(row, view) {
    const original = row.querySelector("figure[data-original] img");
    for (const figure of row.querySelectorAll("figure:not([data-original])")) {
      const image = figure.querySelector("img");
      if (!image) continue;
      let canvas = figure.querySelector("canvas");
      if (view === "picture") { if (canvas) canvas.hidden = true; continue; }
      if (!canvas) {
        canvas = document.createElement("canvas");
        canvas.setAttribute("role", "img");
        figure.querySelector(".layer").append(canvas);
      }
      await Promise.all([original.decode(), image.decode()]);
      if (state.view !== view) return;
      if (canvas.dataset.view !== view) {
        canvas.width = image.naturalWidth;
        canvas.height = image.naturalHeight;
        if (view === "error") paintError(canvas, original, image);
        else canvas.getContext("2d").drawImage(original, 0, 0);
        canvas.dataset.view = view;
        canvas.setAttribute("aria-label", view === "error" ? `Error map: ${image.alt}` : original.alt);
      }
      canvas.hidden = false;
    }
  }

  function setView(view) {
    state.view = view;
    viewer.dataset.view = view;
    legend.hidden = view !== "error";
    for (const b of viewer.querySelectorAll("button[data-view]")) b.setAttribute("aria-pressed", String(b.dataset.view === view));
    for (const row of state.all ? rows : [shownRow()]) overlay(row, view);
  }

  function choose(index) {
    if (!rows.length) return;
    state.current = (index + rows.length) % rows.length;
    rows.forEach((row, i) => (row.hidden = !state.all && i !== state.current));
    [...strip.children].forEach((b, i) => b.setAttribute("aria-pressed", String(i === state.current)));
    const thumb = strip.children[state.current];
    strip.scrollLeft = thumb.offsetLeft - strip.offsetLeft - (strip.clientWidth - thumb.clientWidth) / 2;
    if (state.all) shownRow().scrollIntoView({ block: "nearest" });
    setView(state.view);
    renderWindow();
  }

  // The strip's thumbnails reuse the originals' data: they cost no bytes in the file.
  const strip = viewer.querySelector(".strip");
  rows.forEach((row, i) => {
    const image = row.querySelector("img"), button = document.createElement("button"), thumb = new Image();
    thumb.src = image.src;
    thumb.alt = row.querySelector("h3").firstChild.textContent.trim();
    button.type = "button";
    button.title = thumb.alt;
    button.append(thumb);
    button.addEventListener("click", () => { state.z = 1; choose(i); });
    strip.append(button);
  });
  strip.hidden = rows.length < 2;

  for (const b of viewer.querySelectorAll("button[data-view]")) b.addEventListener("click", () => setView(b.dataset.view));
  for (const b of viewer.querySelectorAll("button[data-zoom]"))
    b.addEventListener("click", () => zoomAt(Number(b.dataset.zoom), 0.5, 0.5, false));
  const all = viewer.querySelector("button.all");
  all.hidden = rows.length < 2;
  all.addEventListener("click", () => {
    state.all = !state.all;
    all.setAttribute("aria-pressed", String(state.all));
    choose(state.current);
  });

  // Pointers: a click magnifies or resets, a drag moves, two fingers pinch. All pictures follow.
  const pointers = new Map();
  let travelled = 0, pinch = null;
  const spot = (stage, event) => {
    const box = stage.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height, box];
  };
  for (const stage of viewer.querySelectorAll(".stage:not(.empty)")) {
    stage.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      stage.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, event);
      if (pointers.size === 1) travelled = 0;
      if (pointers.size === 2) {
        const [a, b] = [...pointers.values()];
        pinch = { gap: Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY), z: state.z };
      }
    });
    stage.addEventListener("pointermove", (event) => {
      const [fx, fy, box] = spot(stage, event);
      if (event.pointerType === "mouse") {
        viewer.style.setProperty("--cx", 100 * fx + "%");
        viewer.style.setProperty("--cy", 100 * fy + "%");
        viewer.classList.add("hovering");
      }
      const before = pointers.get(event.pointerId);
      if (!before) return;
      pointers.set(event.pointerId, event);
      const dx = event.clientX - before.clientX, dy = event.clientY - before.clientY;
      travelled += Math.abs(dx) + Math.abs(dy);
      if (pointers.size === 2 && pinch) {
        const [a, b] = [...pointers.values()];
        const gap = Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
        const [mx, my] = spot(stage, { clientX: (a.clientX + b.clientX) / 2, clientY: (a.clientY + b.clientY) / 2 });
        zoomAt((pinch.z * gap) / Math.max(1, pinch.gap), mx, my, false);
      } else if (state.z > 1) {
        state.x -= (100 * dx) / box.width / state.z;
        state.y -= (100 * dy) / box.height / state.z;
        renderWindow();
      }
    });
    stage.addEventListener("pointerup", (event) => {
      if (pointers.delete(event.pointerId) && !pointers.size && travelled < 6 && !pinch) {
        const [fx, fy] = spot(stage, event);
        state.z > 1 ? zoomAt(1, 0.5, 0.5, false) : zoomAt(4, fx, fy, true);
      }
      if (!pointers.size) pinch = null;
    });
    stage.addEventListener("pointercancel", (event) => { pointers.delete(event.pointerId); pinch = null; });
    stage.addEventListener("pointerleave", () => viewer.classList.remove("hovering"));
    stage.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return; // a plain wheel scrolls the page
      event.preventDefault();
      const [fx, fy] = spot(stage, event);
      zoomAt(state.z * Math.exp(-event.deltaY * 0.01), fx, fy, false);
    }, { passive: false });
    stage.addEventListener("dragstart", (event) => event.preventDefault());
  }

  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  let blinkFrom = null;
  viewer.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key;
    if (moves[key] && state.z > 1 && !event.target.closest("button")) {
      state.x += (moves[key][0] * 12) / state.z;
      state.y += (moves[key][1] * 12) / state.z;
      renderWindow();
    } else if (key === "+" || key === "=") zoomAt(state.z * 2, 0.5, 0.5, false);
    else if (key === "-") zoomAt(state.z / 2, 0.5, 0.5, false);
    else if (key === "0" || key === "Escape") zoomAt(1, 0.5, 0.5, false);
    else if (key === "e" || key === "E") setView(state.view === "error" ? "picture" : "error");
    else if (key === "n" || key === "N") choose(state.current + 1);
    else if (key === "p" || key === "P") choose(state.current - 1);
    else if ((key === "o" || key === "O") && blinkFrom === null) { blinkFrom = state.view; setView("original"); }
    else return;
    event.preventDefault();
  });
  const endBlink = () => { if (blinkFrom !== null) { setView(blinkFrom); blinkFrom = null; } };
  viewer.addEventListener("keyup", (event) => { if (event.key === "o" || event.key === "O") endBlink(); });
  viewer.addEventListener("focusout", endBlink);

  choose(0);
})();
