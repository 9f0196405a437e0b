/* The step-through picture of the sampling: the high-resolution tokens, the image's places in the language model, the
   layers, and the context row as stacks and as a sequence. A slider deals one set after the other; arrow keys or a click
   choose a place. Which token goes where comes from Python, from the model's own sampling. */
(() => {
  const { svg, html, colour } = lens;
  const W = 320;

  lens.deal = (element, props, trigger, watch) => {
    const root = element.querySelector('.dl-deal');
    const view = { sampling: 0, step: 0, place: null };
    let data = null;
    let shown = '';

    function take() {
      data = props.value && props.value.samplings ? props.value : null;
      if (!data) {
        const lacks = props.value && props.value.lacks;
        root.replaceChildren(html('div', { class: 'dl-empty' }, [
          html('b', { text: lacks ? 'No image' : 'No image yet' }),
          html('p', {
            text: lacks || 'Pick an example below, or upload an image in the rail: its tokens are then dealt out here.',
          }),
        ]));
        shown = '';
        return;
      }
      const key = `${data.model} ${data.name} ${data.grid}`;
      if (key !== shown) {
        view.step = sets().length;
        view.place = Math.floor(data.places[0] / 2) * data.places[1] + Math.floor(data.places[1] / 2);
        shown = key;
      }
      draw();
    }
    const sampling = () => data.samplings[view.sampling];
    const sets = () => sampling().sets;
    const where = (index, columns) => `row ${Math.floor(index / columns)}, column ${index % columns}`;

    /* The whole: controls, which stay while stepping, and what they change. */
    function draw() {
      const step = html('output', { text: '' });
      root.replaceChildren(
        html('div', { class: 'dl-look-controls' }, [
          html('div', { class: 'dl-segment', role: 'group', 'aria-label': 'Sampling' },
            data.samplings.map((s, i) =>
              html('button', {
                type: 'button', text: s.name, 'data-sampling': s.key, 'aria-pressed': String(i === view.sampling),
                class: i === view.sampling ? 'dl-on' : '',
                onclick: () => { view.sampling = i; draw(); root.querySelector('.dl-segment .dl-on').focus(); },
              }))),
          html('label', { class: 'dl-slide' }, [
            html('span', { text: 'Sets dealt' }),
            html('input', {
              type: 'range', min: 0, max: sets().length, step: 1, value: view.step, 'aria-label': 'Sets dealt',
              oninput: (event) => { view.step = Number(event.target.value); redraw(); },
            }),
            step,
          ]),
        ]),
        html('p', { class: 'dl-note dl-deal-words', text: data.note + sampling().words }),
        html('div', { class: 'dl-deal-body' }),
        html('p', { class: 'dl-readout', 'aria-live': 'polite' }),
        html('p', { class: 'dl-say', text: data.captions.deal }),
        html('h4', { text: 'And the context row?' }),
        html('div', { class: 'dl-deal-context' }),
        html('p', { class: 'dl-say', text: data.captions.context }),
      );
      redraw();
    }

    function redraw() {
      const focused = document.activeElement && root.contains(document.activeElement) && document.activeElement.classList.contains('dl-deal-places');
      root.querySelector('.dl-slide output').textContent = `${view.step} of ${sets().length}`;
      root.querySelector('.dl-deal-body').replaceChildren(tokens(), places(), layers());
      root.querySelector('.dl-deal-context').replaceChildren(...context());
      root.querySelector('.dl-readout').textContent = told();
      if (focused) root.querySelector('.dl-deal-places').focus({ preventScroll: true });
    }

    function told() {
      const [, columns] = data.grid;
      const last = view.step - 1;
      const now = last < 0
        ? 'Nothing is dealt yet: the language model has the global view alone.'
        : `Set ${last} is now dealt, and enters ${layerOf(last)}.`;
      if (view.place === null) return `${now} Choose a place to see where its tokens come from.`;
      const from = sets().slice(0, view.step).map((set) => `(${Math.floor(set[view.place] / columns)}, ${set[view.place] % columns})`);
      const here = where(view.place, data.places[1]);
      const got = from.length ? ` has got the tokens at (row, column) ${from.join(', ')}` : ' has only its own global token';
      return `${now} The place at ${here}${got}. With this sampling a token lies ${sampling().apart.toFixed(1)} places from the one it is added to, on average.`;
    }
    const layerOf = (k) => (data.layers[k] < data.depth ? `before layer ${data.layers[k]}` : 'nowhere: the model has no such layer');

    /* ---- the high-resolution view: dealt tokens in their stack's colour, the place's own outlined */
    function frame(rows, columns, label, more) {
      const ratio = lens.ratio(data.size);
      const H = W * ratio;
      const canvas = svg('svg', {
        viewBox: `0 0 ${W} ${H}`, class: 'dl-deal-map', role: 'img', 'aria-label': label,
        style: `max-width: min(100%, ${Math.round(420 / ratio)}px)`, ...more,
      });
      canvas.append(svg('image', { href: data.src, width: W, height: H, preserveAspectRatio: 'none' }));
      return { canvas, H, w: W / columns, h: H / rows };
    }
    function lines(rows, columns, H) {
      let d = '';
      for (let r = 1; r < rows; r++) d += `M0,${(H * r) / rows}h${W}`;
      for (let c = 1; c < columns; c++) d += `M${(W * c) / columns},0v${H}`;
      return svg('path', { d, class: 'dl-deal-grid' });
    }
    function tokens() {
      const [rows, columns] = data.grid;
      const { canvas, H, w, h } = frame(rows, columns, `High-resolution view, ${rows} by ${columns} tokens, those of ${view.step} sets coloured`);
      sets().slice(0, view.step).forEach((set, k) => {
        const d = set.map((i) => `M${(i % columns) * w},${Math.floor(i / columns) * h}h${w}v${h}h${-w}z`).join('');
        canvas.append(svg('path', { d, fill: colour(k), class: 'dl-deal-cells', 'data-set': k, 'fill-opacity': k === view.step - 1 ? 0.72 : 0.38 }));
      });
      canvas.append(lines(rows, columns, H));
      if (view.place !== null) {
        sets().slice(0, view.step).forEach((set, k) => {
          const i = set[view.place];
          const x = (i % columns) * w;
          const y = Math.floor(i / columns) * h;
          canvas.append(
            svg('rect', { x, y, width: w, height: h, fill: colour(k) }),
            svg('rect', { x, y, width: w, height: h, class: 'dl-deal-mine' }),
          );
        });
      }
      return figure(`High-resolution view, ${rows} × ${columns} tokens`, canvas);
    }

    /* ---- the image's places in the sequence: a stripe per set that has arrived */
    function places() {
      const [rows, columns] = data.places;
      const { canvas, H, w, h } = frame(rows, columns,
        `Image rows of the language model, ${rows} by ${columns} places. Arrow keys choose a place.`,
        { tabindex: 0, class: 'dl-deal-map dl-deal-places' });
      const across = Math.ceil(Math.sqrt(sets().length));
      const down = Math.ceil(sets().length / across);
      sets().slice(0, view.step).forEach((set, k) => {
        const [r, c] = [Math.floor(k / across), k % across];
        let d = '';
        for (let i = 0; i < rows * columns; i++) {
          const x = ((i % columns) + 0.12 + (0.76 * c) / across) * w;
          const y = (Math.floor(i / columns) + 0.12 + (0.76 * r) / down) * h;
          d += `M${x},${y}h${(0.76 * w) / across}v${(0.76 * h) / down}h${(-0.76 * w) / across}z`;
        }
        canvas.append(svg('path', { d, fill: colour(k), 'fill-opacity': 0.85 }));
      });
      canvas.append(lines(rows, columns, H));
      if (view.place !== null) {
        canvas.append(svg('rect', {
          x: (view.place % columns) * w, y: Math.floor(view.place / columns) * h, width: w, height: h, class: 'dl-deal-mine',
        }));
      }
      canvas.addEventListener('click', (event) => {
        const box = canvas.getBoundingClientRect();
        const c = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
        const r = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
        view.place = r * columns + c;
        redraw();
      });
      canvas.addEventListener('keydown', (event) => {
        const [r, c] = view.place === null ? [0, -1] : [Math.floor(view.place / columns), view.place % columns];
        const [dr, dc] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] || [];
        if (dr === undefined) return;
        event.preventDefault();
        view.place = Math.min(rows - 1, Math.max(0, r + dr)) * columns + Math.min(columns - 1, Math.max(0, c + dc));
        redraw();
      });
      return figure(`Image rows of the language model, ${rows} × ${columns} places`, canvas);
    }
    const figure = (title, canvas) => html('figure', { class: 'dl-figure' }, [html('figcaption', { text: title }), canvas]);

    /* ---- the layers, input at the bottom */
    function layers() {
      const into = {};
      data.layers.forEach((layer, k) => layer < data.depth && (into[layer] ||= []).push(k));
      const last = Math.max(0, ...Object.keys(into).map(Number));
      const rows = [];
      if (last < data.depth - 1) rows.push(html('li', { class: 'dl-deal-more', text: last + 1 === data.depth - 1 ? `layer ${last + 1}` : `layers ${last + 1} to ${data.depth - 1}` }));
      for (let layer = last; layer >= 0; layer--) {
        const chips = (into[layer] || []).map((k) =>
          html('i', { class: k < view.step ? '' : 'dl-no', style: `--c: ${colour(k)}`, text: `set ${k}` }));
        if (layer === 0) chips.unshift(html('i', { style: '--c: var(--source-base)', text: 'global view' }));
        rows.push(html('li', {}, [html('span', { text: `layer ${layer}` }), ...chips]));
      }
      return html('figure', { class: 'dl-figure dl-deal-layers' }, [
        html('figcaption', { text: 'Enters before' }), html('ol', {}, rows),
      ]);
    }

    /* ---- how many rows the context has, as stacks and as a sequence */
    function context() {
      const n = data.places[0] * data.places[1];
      const most = n * (1 + sets().length);
      const block = (rows, source, title) =>
        html('i', { style: `width: ${(100 * rows) / most}%; --c: var(--source-${source})`, title });
      const dealtOut = sets().slice(0, view.step).map((_, k) => k);
      const row = (name, blocks, stacked, rows) =>
        html('div', { class: 'dl-deal-row' }, [
          html('span', { text: name }),
          html('div', { class: 'dl-deal-bar', role: 'img', 'aria-label': `${name}: ${rows} image rows` }, [
            ...blocks,
            stacked.length ? html('div', { class: 'dl-deal-piled', style: `width: ${(100 * n) / most}%` }, stacked) : null,
          ]),
          html('b', { text: `${rows} rows` }),
        ]);
      const base = block(n, 'base', 'global view');
      return [
        row('as stacks', [base], dealtOut.map((k) => html('i', { style: `--c: ${colour(k)}` })), n),
        row('as a sequence', [base.cloneNode(), ...dealtOut.map((k) => block(n, k, `set ${k}`))], [], n * (1 + view.step)),
      ];
    }

    lens.on('escape', () => {
      if (!data || view.place === null) return;
      view.place = null;
      redraw();
    });
    lens.on('views', () => lens.tab() === 'lab' && trigger('views'));
    watch('value', take);
    take();
  };
})();
