/* The stack picture: views or vision layers on the left, LLM layers on the right, one arrow per injection.

   The picture is the plan. Every change is drawn at once and told to Python with the event 'plan'; while the Stacks tab
   is open the event 'live' asks for the new answer as well. Python checks the plan and sends it back. Works with a
   pointer (click, drag, wheel) and by keyboard (Tab, Enter, arrows, + and -). */
(() => {
  const { svg, html, colour } = lens;
  const WIDTH = 372;
  const LEFT = 8; // left edge of views and vision layers
  const BOX = { x: 238, width: 94 }; // LLM layers
  const NODE = 229; // x of the node in front of a layer
  const TOP = 44;

  const number = (gain) => String(Math.round(gain * 1000) / 1000);
  const inTower = (source) => source.startsWith('v'); // enters a layer of the vision tower, not of the LLM
  const order = (name) => {
    if (name === 'base') return -1;
    if (name.startsWith('tap')) return 1e4 + Number(name.slice(3));
    return inTower(name) ? 2e4 + Number(name.slice(1)) : Number(name);
  };
  const text = (entries) =>
    [...entries]
      .sort((a, b) => order(a.source) - order(b.source) || a.layer - b.layer)
      .map((e) => `${e.source}@${inTower(e.source) ? 'v' : ''}${e.layer}` + (e.gain === 1 ? '' : `*${number(e.gain)}`))
      .join(',') || 'none';
  const read = (plan) =>
    plan === 'none'
      ? []
      : plan.split(',').map((part) => {
          const [source, rest] = part.split('@');
          const [layer, gain] = rest.split('*');
          return { source, layer: Number(layer.replace('v', '')), gain: gain === undefined ? 1 : Number(gain) };
        });
  const named = (source) =>
    source.replace(/^tap/, 'untrained tap ').replace(/^v(?=\d)/, 'vision stack ').replace(/^(?=\d)/, 'stack ');
  const before = (source, layer) => `before ${inTower(source) ? 'vision ' : ''}layer ${layer}`;

  lens.picture = (element, props, trigger, watch) => {
    const root = element.querySelector('.dl-picture');
    let entries = [];
    let seats = {}; // source -> layer to come back to when it is switched on again
    let selected = null; // {source, layer}
    let hovered = null;
    let timer = null;
    let waiting = null;
    let told = ''; // the model and plan that Python knows of
    let pending = ''; // those of a change that Python has not confirmed yet

    const model = () => props.value || {};
    const layersOf = (source) => (inTower(source) ? model().layout.vision : model().layout.layers);
    const find = (source, layer) => entries.find((e) => e.source === source && e.layer === layer);

    function take() {
      const value = model();
      if (!value.layout) return;
      // the answer to an earlier change of the picture, while a later one is on its way
      if (pending.startsWith(`${value.name} `) && pending !== `${value.name} ${value.plan}`) return;
      pending = '';
      entries = read(value.plan);
      seats = {};
      value.layout.sources.forEach((s) => (seats[s.name] = s.home));
      entries.forEach((e) => (seats[e.source] = e.layer));
      const changed = told && told !== `${value.name} ${value.plan}`;
      told = `${value.name} ${value.plan}`;
      lens.plan = value.plan;
      lens.model = value.name;
      lens.emit('plan', lens.plan);
      if (changed) ask();
      if (selected && !arrows().some((a) => a.source === selected.source && a.layer === selected.layer)) selected = null;
      draw();
    }

    /* All arrows there are to see: the plan's, and one dashed arrow for each source that is off. */
    function arrows() {
      const used = new Set(entries.map((e) => e.source));
      const off = model().layout.sources.filter((s) => !used.has(s.name));
      return [
        ...entries.map((e) => ({ ...e, on: true })),
        ...off.map((s) => ({ source: s.name, layer: seats[s.name] ?? s.home, gain: 0, on: false })),
      ].sort((a, b) => order(a.source) - order(b.source) || a.layer - b.layer);
    }

    function tell(soon) {
      lens.plan = text(entries);
      told = pending = `${model().name} ${lens.plan}`;
      lens.emit('plan', lens.plan);
      clearTimeout(waiting);
      waiting = setTimeout(() => (pending = ''), 10000);
      clearTimeout(timer);
      timer = setTimeout(
        () => {
          timer = null;
          trigger('plan', { plan: lens.plan });
          ask();
        },
        soon ? 0 : 140,
      );
    }

    /* Asks for the answer under the plan of now. It is counted here, since gradio comes to a trigger only later. */
    function ask() {
      if (lens.tab() !== 'stacks') return;
      lens.asked();
      trigger('live', { plan: lens.plan });
    }

    function change(next, focus, soon = true) {
      entries = next;
      entries.forEach((e) => (seats[e.source] = e.layer));
      if (focus) selected = focus;
      draw(focus);
      tell(soon);
      say();
    }
    function toggle(source, layer) {
      seats[source] = layer;
      const next = find(source, layer)
        ? entries.filter((e) => !(e.source === source && e.layer === layer))
        : [...entries, { source, layer, gain: 1 }];
      change(next, { source, layer });
    }
    function move(source, from, to) {
      if (to < 0 || to >= layersOf(source) || from === to || find(source, to)) return;
      const there = find(source, from);
      seats[source] = to;
      if (!there) {
        selected = { source, layer: to };
        draw(selected);
        return;
      }
      change(
        entries.map((e) => (e === there ? { ...e, layer: to } : e)),
        { source, layer: to },
      );
    }
    function scale(source, layer, gain) {
      gain = Math.round(Math.max(-9, Math.min(9, gain)) * 1000) / 1000;
      const next = entries.filter((e) => !(e.source === source && e.layer === layer));
      if (gain !== 0) next.push({ source, layer, gain });
      change(next, { source, layer }, false);
    }
    function say() {
      const live = root.querySelector('.dl-live');
      if (live) live.textContent = `Plan ${lens.plan}`;
    }

    /* ---- geometry */
    function plan_of_page() {
      const layout = model().layout;
      const step = Math.max(11.5, Math.min(42, 430 / layout.layers));
      const gap = Math.min(12, step * 0.32);
      const bottom = TOP + layout.layers * step;
      return {
        step,
        gap,
        bottom,
        x: NODE,
        height: Math.max(bottom + 14, 380),
        box: (layer) => TOP + (layout.layers - 1 - layer) * step,
        node: (layer) => TOP + (layout.layers - layer) * step - gap / 2 + (layer === 0 ? 3 : 0),
      };
    }

    /* ---- drawing */
    function draw(focus) {
      const layout = model().layout;
      if (!layout) return;
      const place = plan_of_page();
      const active = root.contains(document.activeElement) ? document.activeElement.dataset.key : null;
      const key = focus ? `${focus.source}@${focus.layer}` : active;
      const canvas = svg('svg', {
        viewBox: `0 0 ${WIDTH} ${place.height}`,
        class: 'dl-canvas',
        role: 'group',
        'aria-label': `Stack picture of ${model().name}: one arrow per injection`,
      });
      const taps = layout.sources.some((s) => s.tap !== null && s.tap !== undefined);
      const within = layout.sources.some((s) => inTower(s.name)); // stacks that enter the tower itself
      const anchors = taps || within ? drawTower(canvas, layout, place, within) : drawViews(canvas, layout, place);
      drawLayers(canvas, layout, place);
      const all = arrows();
      const taken = {};
      all.forEach((arrow) => {
        const side = inTower(arrow.source) ? place.tower : place;
        const k = (taken[before(arrow.source, arrow.layer)] = (taken[before(arrow.source, arrow.layer)] ?? -1) + 1);
        drawArrow(canvas, arrow, anchors[arrow.source], side.x - 19 * k, side);
      });
      root.replaceChildren(canvas, ...panel(all));
      if (key) root.querySelector(`[data-key="${key}"]`)?.focus({ preventScroll: true });
      highlight();
    }

    const label = (x, y, words, more = {}) => svg('text', { x, y, class: 'dl-label', ...more, text: words });

    /* The pictures that the model sees, with the token grid; cells of dilated samples in their stack's colour. */
    function drawViews(canvas, layout, place) {
      canvas.append(label(LEFT, 18, 'What the model sees', { class: 'dl-head' }));
      const stacks = layout.sources.filter((s) => s.name !== 'base').map((s) => s.name);
      const shown = (lens.views && lens.views.views) || placeholder(stacks);
      const anchors = {};
      const fine = shown.find((v) => v.owners) || (shown.length > 1 ? shown[shown.length - 1] : null);
      const coarse = shown.find((v) => v !== fine) || shown[0];
      let y = TOP;
      if (fine) {
        y = drawView(canvas, fine, LEFT, y, 154, 170);
        const words = stacks.length
          ? `dealt out into ${stacks.length} samples of ${coarse.grid[0] * coarse.grid[1]}`
          : 'merged into the same tokens';
        canvas.append(label(LEFT, y + 12, words));
        const top = TOP + 14;
        const bottom = y - 8;
        stacks.forEach((name, i) => {
          anchors[name] = [LEFT + 158, bottom - ((bottom - top) * (i + 0.5)) / stacks.length];
        });
        y += 34;
      }
      const size = fine ? 96 : 154;
      const start = fine ? Math.max(y, place.bottom - size - 16) : y;
      const end = drawView(canvas, coarse, LEFT, start, size, fine ? 104 : 180);
      anchors.base = [LEFT + size + 4, (start + end) / 2 + 8];
      return anchors;
    }

    function placeholder(stacks) {
      const g = 8;
      const coarse = { name: 'global view', grid: [g, g], src: '' };
      if (!stacks.length) return [coarse];
      const side = Math.ceil(Math.sqrt(stacks.length));
      const fine = g * side; // as many high-resolution tokens as all samples hold
      const owners = Array.from({ length: fine }, (_, r) =>
        Array.from({ length: fine }, (_, c) => stacks[(r % side) * side + (c % side)] || ''),
      );
      return [coarse, { name: 'high-resolution view', grid: [fine, fine], src: '', owners }];
    }

    function drawView(canvas, view, x, y, wide, high) {
      const [rows, columns] = view.grid;
      canvas.append(label(x, y + 8, `${view.name} · ${rows} × ${columns}`));
      const ratio = view.size ? view.size[1] / view.size[0] : rows / columns;
      const width = Math.min(wide, high / ratio);
      const height = width * ratio;
      const top = y + 14;
      if (view.src) {
        canvas.append(
          svg('image', {
            href: view.src, x, y: top, width, height, preserveAspectRatio: 'none',
            class: view.size[0] < 1.5 * width ? 'dl-view' : '', // few pixels are shown as pixels
          }),
        );
      } else {
        canvas.append(svg('rect', { x, y: top, width, height, class: 'dl-noview' }));
      }
      const w = width / columns;
      const h = height / rows;
      if (view.owners) {
        const bySource = {};
        view.owners.forEach((row, r) =>
          row.forEach((owner, c) => {
            if (!owner) return;
            (bySource[owner] ||= []).push(
              `M${(x + c * w).toFixed(2)},${(top + r * h).toFixed(2)}h${w.toFixed(2)}v${h.toFixed(2)}h${(-w).toFixed(2)}z`,
            );
          }),
        );
        for (const [owner, path] of Object.entries(bySource)) {
          canvas.append(svg('path', { d: path.join(''), fill: colour(owner), class: 'dl-cells', 'data-cells': owner }));
        }
      }
      let lines = '';
      for (let r = 1; r < rows; r++) lines += `M${x},${top + r * h}h${width}`;
      for (let c = 1; c < columns; c++) lines += `M${x + c * w},${top}v${height}`;
      canvas.append(svg('path', { d: lines, class: 'dl-grid' }));
      canvas.append(svg('rect', { x, y: top, width, height, class: 'dl-frame' }));
      return top + height;
    }

    /* The vision tower with its taps, and the image below it. */
    function drawTower(canvas, layout, place, within) {
      canvas.append(label(LEFT, 18, 'Vision tower', { class: 'dl-head' }));
      canvas.append(label(LEFT, 33, 'image at bottom'));
      const views = (lens.views && lens.views.views) || [{ name: 'the image', grid: [6, 6], src: '' }];
      const shown = (within && views.find((v) => v.owners)) || views[0];
      const imageTop = Math.max(TOP + 140, place.bottom - 122);
      drawView(canvas, shown, LEFT, imageTop, 150, 104);
      const n = layout.vision;
      const room = imageTop - TOP - 14;
      const step = Math.min(34, room / n);
      const x = LEFT + (within ? 88 : 30);
      const gap = Math.min(8, step * 0.3);
      const anchors = {};
      const byTap = {};
      layout.sources.forEach((s) => s.tap !== null && s.tap !== undefined && (byTap[s.tap] = s.name));
      for (let i = 0; i < n; i++) {
        const top = TOP + (n - 1 - i) * step;
        const height = step - gap;
        const tap = byTap[i];
        canvas.append(svg('rect', { x, y: top, width: 100, height, rx: 5, class: 'dl-layer' }));
        if (step >= 15 || tap !== undefined || i === n - 1) {
          canvas.append(
            label(x + 8, top + height / 2 + 3.5, `block ${i}`, {
              class: 'dl-layer-name',
              'font-size': Math.min(11, height + 1),
            }),
          );
        }
        if (tap !== undefined) anchors[tap] = [x + 102, top + height / 2];
      }
      anchors.base = [x + 102, TOP + 4];
      place.tower = {
        step,
        x: x - 10,
        height: place.height,
        node: (layer) => TOP + (n - layer) * step - gap / 2,
      };
      layout.sources.filter((s) => inTower(s.name)).forEach((s, i) => (anchors[s.name] = [LEFT + 4 + 9 * i, imageTop + 10]));
      canvas.append(
        svg('path', { d: `M${x + 50},${imageTop - 2}v${-(imageTop - TOP - n * step) + 2}`, class: 'dl-flow' }),
      );
      return anchors;
    }

    function drawLayers(canvas, layout, place) {
      canvas.append(label(BOX.x, 18, 'Language model', { class: 'dl-head' }));
      canvas.append(label(BOX.x, 33, 'input at bottom'));
      const height = place.step - place.gap;
      const every = place.step >= 15 ? 1 : 4;
      for (let layer = 0; layer < layout.layers; layer++) {
        const y = place.box(layer);
        canvas.append(
          svg('rect', { x: BOX.x, y, width: BOX.width, height, rx: Math.min(6, height / 3), class: 'dl-layer' }),
        );
        if (layer % every === 0 || layer === layout.layers - 1) {
          canvas.append(
            label(BOX.x + 10, y + height / 2 + 4, `layer ${layer}`, {
              class: 'dl-layer-name',
              'font-size': Math.min(11.5, height + 2),
            }),
          );
        }
      }
      const effect = lens.effect;
      if (!effect || effect.plan !== lens.plan || effect.model !== model().name) return;
      const at = hovered || selected;
      const row = at && effect.rows[at.source];
      canvas.append(label(WIDTH - 2, 33, 'effect', { 'text-anchor': 'end' }));
      const values = row || effect.most;
      for (let layer = 0; layer < layout.layers; layer++) {
        canvas.append(
          svg('rect', {
            x: BOX.x + BOX.width + 6,
            y: place.box(layer) + height * 0.2,
            width: Math.max(1, Math.min(1, values[layer] / effect.scale) * 26),
            height: height * 0.6,
            rx: 2,
            class: 'dl-effect',
            style: row ? `fill: ${colour(at.source)}` : null,
          }, svg('title', { text: `${row ? named(at.source) : 'strongest source'}: ${values[layer].toFixed(3)}` })),
        );
      }
    }

    function drawArrow(canvas, arrow, anchor, x, place) {
      const { source, layer, gain, on } = arrow;
      const [x0, y0] = anchor || [LEFT + 100, place.bottom];
      const y = place.node(layer);
      const info = model().layout.sources.find((s) => s.name === source);
      const where = before(source, layer);
      const what = on ? `on, ${where}, gain ${number(gain)}` : `off, was ${where}`;
      const group = svg('g', {
        class: `dl-arrow${on ? '' : ' dl-off'}${gain < 0 ? ' dl-negative' : ''}`,
        role: 'switch',
        tabindex: 0,
        'aria-checked': String(on),
        'aria-label': `${named(source)}, ${info.label}: ${what}. Enter switches, arrow keys move, plus and minus scale.`,
        'data-key': `${source}@${layer}`,
        'data-source': source,
        style: `--c: ${colour(source)}; --ct: var(--source-${source}-text)`,
      });
      const bend = Math.max(28, (x - x0) * 0.55);
      const path = inTower(source) // up from the image below
        ? `M${x0},${y0}C${x0},${(y0 + y) / 2} ${x0},${y} ${x - 8},${y}`
        : `M${x0},${y0}C${x0 + bend},${y0} ${x - bend},${y} ${x - 8},${y}`;
      const width = on ? Math.max(1.4, Math.min(7, 3 * Math.abs(gain))) : 1.6;
      group.append(
        svg('path', { d: path, class: 'dl-hit' }),
        svg('path', { d: path, class: 'dl-line', 'stroke-width': width }),
        svg('circle', { cx: x, cy: y, r: 12, class: 'dl-hit-end' }),
        svg('circle', { cx: x, cy: y, r: Math.min(8, place.step * 0.45 + 2), class: 'dl-node' }),
        svg('text', { x, y: y + 3.6, class: 'dl-sign', text: on ? (gain < 0 ? '−' : '+') : '' }),
        svg('text', { x: x - 12, y: y - 6, class: 'dl-tag', text: source + (on && gain !== 1 ? ` ×${number(gain)}` : '') }),
      );
      group.addEventListener('pointerenter', () => hover({ source, layer }));
      group.addEventListener('pointerleave', () => hover(null));
      group.addEventListener('focus', () => select(source, layer));
      group.addEventListener('keydown', (event) => keys(event, source, layer, gain, on));
      group.addEventListener('pointerdown', (event) => drag(event, canvas, source, layer, place));
      group.addEventListener(
        'wheel',
        (event) => {
          if (event.ctrlKey) return;
          event.preventDefault();
          scale(source, layer, (on ? gain : 0) + (event.deltaY < 0 ? 0.1 : -0.1));
        },
        { passive: false },
      );
      canvas.append(group);
    }

    /* ---- pointer and keys */
    function hover(at) {
      hovered = at;
      highlight();
    }
    function highlight() {
      const source = (hovered || selected || {}).source;
      root.querySelectorAll('[data-cells]').forEach((cells) => {
        cells.classList.toggle('dl-dim', Boolean(hovered) && cells.dataset.cells !== source);
        cells.classList.toggle('dl-strong', Boolean(hovered) && cells.dataset.cells === source);
      });
      root.querySelectorAll('.dl-arrow').forEach((arrow) => {
        arrow.classList.toggle(
          'dl-selected',
          Boolean(selected) && arrow.dataset.key === `${selected.source}@${selected.layer}`,
        );
      });
    }
    function select(source, layer) {
      if (selected && selected.source === source && selected.layer === layer) return;
      selected = { source, layer };
      highlight();
      const old = root.querySelector('.dl-gain');
      if (old) old.replaceWith(gainPanel(arrows()));
    }
    function drag(event, canvas, source, layer, place) {
      if (event.button) return;
      event.preventDefault();
      const group = event.currentTarget;
      group.focus({ preventScroll: true });
      const box = canvas.getBoundingClientRect();
      const zoom = place.height / box.height;
      let to = layer;
      let moved = false;
      const ghost = svg('circle', { r: 9, class: 'dl-ghost', style: `--c: ${colour(source)}`, cx: place.x, cy: -20 });
      canvas.append(ghost);
      const onMove = (e) => {
        if (!moved && Math.hypot(e.clientX - event.clientX, e.clientY - event.clientY) < 5) return;
        moved = true;
        const y = (e.clientY - box.top) * zoom;
        const layers = layersOf(source);
        to = 0;
        for (let l = 1; l < layers; l++) if (Math.abs(place.node(l) - y) < Math.abs(place.node(to) - y)) to = l;
        ghost.setAttribute('cy', place.node(to));
      };
      const done = (e) => {
        window.removeEventListener('pointermove', onMove);
        window.removeEventListener('pointerup', done);
        window.removeEventListener('pointercancel', done);
        ghost.remove();
        if (e.type === 'pointercancel') return;
        if (!moved) toggle(source, layer);
        else if (find(source, layer)) move(source, layer, to);
        else if (!find(source, to)) change([...entries, { source, layer: to, gain: 1 }], { source, layer: to });
      };
      window.addEventListener('pointermove', onMove);
      window.addEventListener('pointerup', done);
      window.addEventListener('pointercancel', done);
    }
    function keys(event, source, layer, gain, on) {
      const act = {
        Enter: () => toggle(source, layer),
        ' ': () => toggle(source, layer),
        ArrowUp: () => move(source, layer, layer + 1),
        ArrowDown: () => move(source, layer, layer - 1),
        '+': () => scale(source, layer, (on ? gain : 0) + 0.1),
        '=': () => scale(source, layer, (on ? gain : 0) + 0.1),
        '-': () => scale(source, layer, (on ? gain : 0) - 0.1),
      }[event.key];
      if (!act) return;
      event.preventDefault();
      act();
    }

    /* ---- below the picture: gain, presets, what the plan is */
    function gainPanel(all) {
      const at = selected && all.find((a) => a.source === selected.source && a.layer === selected.layer);
      if (!at) {
        return html('div', { class: 'dl-gain dl-hint' }, [
          html('p', { text: 'Click an arrow to switch it, drag its end to another layer, scroll over it for its gain.' }),
        ]);
      }
      const info = model().layout.sources.find((s) => s.name === at.source);
      const value = html('output', { text: at.on ? `×${number(at.gain)}` : 'off' });
      const slider = html('input', {
        type: 'range', min: -1, max: 2, step: 0.05, value: at.gain, 'data-key': 'gain',
        'aria-label': `Gain of ${named(at.source)} ${before(at.source, at.layer)}`,
        oninput: (event) => {
          value.textContent = `×${number(Number(event.target.value))}`;
        },
        onchange: (event) => {
          const gain = Number(event.target.value);
          const next = entries.filter((e) => !(e.source === at.source && e.layer === at.layer));
          if (gain !== 0) next.push({ source: at.source, layer: at.layer, gain });
          change(next, null);
        },
      });
      return html('div', { class: 'dl-gain', style: `--c: ${colour(at.source)}` }, [
        html('div', { class: 'dl-gain-row' }, [
          html('b', { text: `${named(at.source)} → ${before(at.source, at.layer)}` }),
          slider,
          value,
        ]),
        html('p', { text: `${info.label}; as trained: ${info.words}.` }),
      ]);
    }

    function panel(all) {
      const value = model();
      const chip = (name, plan) =>
        html('button', {
          type: 'button', 'data-key': `preset ${name}`, class: `dl-chip${plan === lens.plan ? ' dl-chosen' : ''}`, 'aria-pressed': String(plan === lens.plan),
          text: name, title: plan, onclick: () => preset(plan),
        });
      const first = ['as trained', 'single injection', 'none', 'reversed'];
      const known = Object.fromEntries(value.presets);
      const rest = value.presets.filter(([name]) => !first.includes(name));
      const more = html(
        'select',
        { class: 'dl-chip', 'aria-label': 'More presets', 'data-key': 'presets', onchange: (event) => event.target.value && preset(event.target.value) },
        [
          html('option', { value: '', text: 'more…' }),
          ...rest.map(([name, plan]) => html('option', { value: plan, text: name, selected: plan === lens.plan })),
        ],
      );
      return [
        gainPanel(all),
        html('div', { class: 'dl-presets', role: 'group', 'aria-label': 'Presets' }, [
          ...first.filter((name) => known[name] !== undefined).map((name) => chip(name, known[name])),
          rest.length ? more : null,
        ]),
        html('div', { class: 'dl-live', 'aria-live': 'polite' }),
      ];
    }
    function preset(plan) {
      selected = null;
      change(read(plan), null);
    }

    watch('value', take);
    // Another model's value may be here while its plan is not taken over yet: `take` draws it then.
    const redraw = () => lens.model === model().name && draw();
    lens.on('views', redraw);
    lens.on('effect', redraw);
    lens.on('set-plan', preset);
    lens.on('image', ask);
    /* What was drawn too late is of another plan, or still says that it is being made: it is asked again, once. */
    let repeated = false;
    lens.on('drawn', () => {
      if (timer) return; // a change is about to be asked
      const parts = [...document.querySelectorAll('#dl-live-answer [data-of], #dl-live-more [data-of]')];
      const now = `${lens.model} ${lens.plan}`;
      const late = parts.some((part) => part.dataset.of !== now || part.querySelector('.dl-busy'));
      repeated = late && !repeated && lens.tab() === 'stacks';
      if (repeated) ask();
    });
    take();
  };
})();
