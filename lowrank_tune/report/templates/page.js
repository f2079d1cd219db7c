// Draws the page's charts with plotly, which is packed in the same file. Without this script the page shows pictures.
"use strict";
(() => {
  if (!("DecompressionStream" in window)) return;
  const config = {
    displaylogo: false, responsive: true, showTips: false,
    // Only what works by itself: plotly would add a button that uploads the chart.
    modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
  };
  const texts = new Map();
  const unpack = async (script) => {
    const bytes = Uint8Array.from(atob(script.textContent), (letter) => letter.charCodeAt(0));
    const whole = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    texts.set(script.id, await new Response(whole).text());
  };
  document.documentElement.classList.add("live");

  const trials = document.getElementById("trials-linked");
  const link = trials && openTrials(trials, config);
  const draw = (place) => {
    if (place.dataset.drawn) return;
    place.dataset.drawn = "yes";
    const figure = JSON.parse(texts.get(place.dataset.figure));
    if (link && figure.data.some((trace) => trace.customdata)) link(place, figure);
    else Plotly.newPlot(place, figure.data, figure.layout, config);
  };
  const charts = [...document.querySelectorAll("[data-figure]")];

  const numbers = (text) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return new Float32Array(bytes.buffer);
  };

  const openPlaces = (root) => {
    const all = JSON.parse(document.getElementById(root.dataset.places).textContent);
    const [height, width] = all.grid;
    const chooser = (name) => root.querySelector(`[data-choose=${name}]`);
    const fill = (name, values, words) => {
      for (const [place, value] of values.entries()) chooser(name).add(new Option(words(value), place));
      chooser(name).addEventListener("change", show);
    };
    const grid = (flat, start = 0) => Array.from({ length: height }, (_, row) =>
      Array.from(flat.subarray(start + row * width, start + (row + 1) * width)));
    const ends = (grids) => {
      const flat = grids.flat(2).filter(Number.isFinite);
      return flat.length ? [Math.min(...flat), Math.max(...flat)] : [0, 1];
    };

    const panel = (name, title, values, limits, colors, unit, image, over) => {
      const place = root.querySelector(`[data-panel=${name}]`);
      place.parentElement.hidden = !values;
      if (!values) return;
      const rows = Array.from({ length: height }, (_, row) => row);
      const traces = [{
        type: "heatmap", z: values, zmin: limits[0], zmax: limits[1], colorscale: colors, opacity: over ? 0.6 : 1,
        hovertemplate: `row %{y}, column %{x}: %{z:.4g}<extra></extra>`, y: rows,
        colorbar: { orientation: "h", thickness: 8, y: -0.02, yanchor: "top", len: 1, nticks: 5, outlinewidth: 0,
          tickfont: { size: 11 } },
      }];
      place.setAttribute("role", "img");
      place.setAttribute("aria-label",
        `${title}, ${height} by ${width} tokens, from ${limits[0].toPrecision(3)} to ${limits[1].toPrecision(3)} ${unit}`);
      Plotly.react(place, traces, layoutOf(title, image, over), { ...config, displayModeBar: false });
    };

    const layoutOf = (title, image, over) => ({
      title: { text: title, font: { size: 13 }, x: 0.5, xanchor: "center", y: 0.98, yanchor: "top" },
      font: { family: "system-ui, sans-serif", color: "#1a1a1a" },
      margin: { l: 2, r: 2, t: 26, b: 34 }, dragmode: false, paper_bgcolor: "#fff", plot_bgcolor: "#fff",
      xaxis: { visible: false, range: [-0.5, width - 0.5], constrain: "domain", fixedrange: true },
      yaxis: { visible: false, range: [height - 0.5, -0.5], scaleanchor: "x", constrain: "domain", fixedrange: true },
      images: over && image.photograph ? [{
        source: image.photograph, xref: "x", yref: "y", x: -0.5, y: -0.5, sizex: width, sizey: height,
        xanchor: "left", yanchor: "top", sizing: "stretch", layer: "below",
      }] : [],
      shapes: image.boxes.map(([x0, y0, x1, y1]) => ({
        type: "rect", x0: x0 * width - 0.5, x1: x1 * width - 0.5, y0: y0 * height - 0.5, y1: y1 * height - 0.5,
        line: { color: "#00e5ff", width: 2 }, layer: "above",
      })),
    });

    const photograph = (image) => {
      const picture = root.querySelector("[data-photograph]");
      picture.parentElement.hidden = !image.photograph;
      if (!image.photograph) return;
      picture.querySelector("img").src = image.photograph;
      picture.querySelector("img").alt = `Photograph of test image ${image.image}`;
      picture.querySelectorAll("i").forEach((box) => box.remove());
      for (const [x0, y0, x1, y1] of image.boxes) {
        const box = document.createElement("i");
        Object.assign(box.style, { left: `${100 * x0}%`, top: `${100 * y0}%`, width: `${100 * (x1 - x0)}%`,
          height: `${100 * (y1 - y0)}%` });
        picture.append(box);
      }
    };

    const told = (image, rank, methods) => {
      const ratio = (method) => method.regions.error_inside / method.regions.error_outside;
      const parts = methods.map((method) => `${method.name}: token cosine ${method.cosine.toFixed(4)}`
        + (method.regions ? `, error inside the boxes ${ratio(method).toFixed(2)} times that outside` : ""));
      return `Test image ${image.image} at rank ${rank}. ${parts.join("; ")}.`;
    };

    function show() {
      const image = all.images[chooser("image").value];
      const rank = all.ranks[chooser("rank").value];
      const channel = Number(chooser("channel").value);
      const methods = image.ranks[rank];
      const maps = methods.map((method) => ({
        ...method, errors: grid(numbers(method.errors)), cosines: grid(numbers(method.cosines)),
        map: grid(numbers(method.maps), channel * height * width),
      }));
      const original = grid(numbers(image.original), channel * height * width);
      const lengths = grid(numbers(image.lengths));
      const { Magma, Viridis } = all.colors;
      const highest = ends(maps.map((method) => method.errors))[1];
      const cosines = ends(maps.map((method) => method.cosines));
      const values = ends([original, ...maps.map((method) => method.map)]);
      photograph(image);
      panel("lengths", "token lengths", lengths, ends([lengths]), Viridis, "", image);
      panel("original", `channel ${all.channels[channel]}: original`, original, values, Viridis, "", image);
      for (const place of [0, 1]) {
        const method = maps[place];
        const name = method ? method.name : "";
        panel(`errors-${place}`, `${name}: error`, method && method.errors, [0, highest], Magma, "RMS", image);
        panel(`cosines-${place}`, `${name}: token cosine`, method && method.cosines, cosines, Viridis, "", image,
          all.placed && image.photograph);
        panel(`map-${place}`, `channel ${all.channels[channel]}: ${name}`, method && method.map, values, Viridis, "",
          image);
      }
      root.querySelector("[data-told]").textContent = told(image, rank, methods);
    }

    fill("image", all.images, (image) => `test image ${image.image}`);
    fill("rank", all.ranks, (rank) => `rank ${rank}`);
    fill("channel", all.channels, (channel) => `channel ${channel}`);
    if (root.dataset.rank) chooser("rank").value = String(Math.max(0, all.ranks.indexOf(Number(root.dataset.rank))));
    show();
  };
  const whenNear = (places, open) => {
    const watch = new IntersectionObserver((seen) => {
      for (const { isIntersecting, target } of seen) if (isIntersecting) { watch.unobserve(target); open(target); }
    }, { rootMargin: "800px" });
    places.forEach((place) => watch.observe(place));
  };
  const start = async () => {
    await Promise.all([...document.querySelectorAll("script[type='application/gzip']")].map(unpack));
    const plotly = document.createElement("script");
    plotly.textContent = texts.get("plotly");
    document.head.append(plotly);
    whenNear(charts, draw);
    whenNear(document.querySelectorAll("[data-places]"), openPlaces);
    // What is folded is not printed, and has no width to be drawn in.
    addEventListener("beforeprint", () => charts.filter((place) => !place.closest("details:not([open])")).forEach(draw));
  };
  // What is read comes first.
  requestAnimationFrame(() => setTimeout(start));
})();
