/* The linked view: the answer's words, the image's tokens and the layers. Hover previews, a click pins, Esc clears,
   arrow keys step. All data are here once the answer is; only single heads of large models are fetched ('heads'). */
(() => {
  const { svg, html, percent } = lens;
  const MODES = [
    ['attention', 'Attention'],
    ['injected', 'What is injected'],
    ['residual', 'Residual stream'],
    ['ratio', 'Ratio'],
    ['cosine', 'Cosine'],
  ];

  function bytes(text) {
    const raw = atob(text);
    const out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  }
  const floats = (text) => new Float32Array(bytes(text).buffer);
  function halves(text) {
    const from = new Uint16Array(bytes(text).buffer);
    const out = new Float32Array(from.length);
    for (let i = 0; i < from.length; i++) {
      const e = (from[i] >> 10) & 31;
      const m = from[i] & 1023;
      const size = e === 0 ? m * 2 ** -24 : e === 31 ? NaN : (1 + m / 1024) * 2 ** (e - 15);
      out[i] = from[i] & 32768 ? -size : size;
    }
    return out;
  }
  const mix = (a, b, t) =>
    '#' +
    [1, 3, 5]
      .map((i) => {
        const x = parseInt(a.slice(i, i + 2), 16);
        const y = parseInt(b.slice(i, i + 2), 16);
        return Math.round(x + (y - x) * t)
          .toString(16)
          .padStart(2, '0');
      })
      .join('');
  function ramp(colours, t) {
    const at = Math.max(0, Math.min(1, t)) * (colours.length - 1);
    const i = Math.min(colours.length - 2, Math.floor(at));
    return mix(colours[i], colours[i + 1], at - i);
  }
  const short = (v) => (!Number.isFinite(v) ? '–' : Math.abs(v) >= 100 ? v.toFixed(0) : v.toPrecision(3));

  lens.look = (element, props, trigger, watch) => {
    const root = element.querySelector('.dl-look');
    let data = null; // the value, unpacked
    const view = { mode: 'attention', layer: 0, head: 'mean', fixed: true, hide: false, image: 0, letters: false };
    const pin = { word: null, patch: null };
    const preview = { word: null, patch: null };

    function take() {
      const value = props.value;
      if (!value || !value.id) {
        data = null;
        root.replaceChildren();
        return;
      }
      const same = data && data.id === value.id;
      data = { ...value, kinds: value.kinds.map((k) => ({ ...k, values: floats(k.data) })) };
      units(same);
      const a = value.attention;
      data.attention = a && { ...a, rows: a.asked + a.tokens, mean: halves(a.mean), heads_: {} };
      if (a) for (const [layer, text] of Object.entries(a.byLayer)) data.attention.heads_[layer] = halves(text);
      if (!same) {
        pin.word = data.units.findIndex((w) => w.tokens.length);
        if (pin.word < 0) pin.word = null;
        pin.patch = null;
        view.image = 0;
        if (!a && view.mode === 'attention') view.mode = 'injected';
        if (!kinds(view.mode).length && view.mode !== 'attention') view.mode = 'residual';
        view.layer = a && pin.word !== null ? sharpest(pin.word) : Math.min(view.layer, data.layers - 1);
      }
      draw();
    }

    /* What can be clicked: the answer's words, or its tokens where these are letters. */
    function units(same) {
      const letters = data.tokens.filter((t) => t.text.trim()).every((t) => t.text.trim().length === 1);
      if (!same) view.letters = letters && data.tokens.length > 1;
      data.spelt = data.words.some((w) => w.tokens.length > 1);
      data.units = view.letters ? data.tokens.map((t, i) => ({ ...t, tokens: i < data.recorded ? [i] : [] })) : data.words;
    }

    /* ---- numbers */
    const kinds = (mode) => data.kinds.filter((k) => k.key.split(' ')[0] === mode);
    const image = () => data.images[view.image];
    const rowsOfWord = (word) =>
      word < 0 ? [data.attention.asked + word] : data.units[word].tokens.map((t) => data.attention.asked + t);

    /* attention of one layer and head or the mean: (row, patch over all images) -> share */
    function attend() {
      const a = data.attention;
      const L = view.layer;
      if (view.head === 'mean') return (row, i) => a.mean[(L * a.rows + row) * a.n + i];
      const heads = a.heads_[L];
      if (!heads) {
        lens.wanted = L;
        trigger('heads', { layer: L });
        return null;
      }
      return (row, i) => heads[(Number(view.head) * a.rows + row) * a.n + i];
    }
    function wordMap(word) {
      const share = attend();
      if (!share) return null;
      const rows = rowsOfWord(word);
      const { start, n } = image();
      const out = new Float64Array(n);
      for (let i = 0; i < n; i++) for (const row of rows) out[i] += share(row, start + i) / rows.length;
      if (view.hide) for (const s of data.attention.sinks[view.layer]) if (s >= start && s < start + n) out[s - start] = NaN;
      return out;
    }
    /* the highest share of this word in any layer: the fixed scale of the mean */
    function wordLimit(word) {
      const a = data.attention;
      const rows = rowsOfWord(word);
      const { start, n } = image();
      let most = 0;
      for (let l = 0; l < data.layers; l++) {
        for (let i = start; i < start + n; i++) {
          let v = 0;
          for (const row of rows) v += a.mean[(l * a.rows + row) * a.n + i] / rows.length;
          if (v > most) most = v;
        }
      }
      return most || 1;
    }
    /* the layer in which this word looks hardest at a single token that is no sink */
    function sharpest(word) {
      const a = data.attention;
      const rows = rowsOfWord(word);
      let best = [0, 0];
      for (let l = 0; l < data.layers; l++) {
        const sinks = new Set(a.sinks[l]);
        for (let i = 0; i < a.n; i++) {
          if (sinks.has(i)) continue;
          let v = 0;
          for (const row of rows) v += a.mean[(l * a.rows + row) * a.n + i] / rows.length;
          if (v > best[0]) best = [v, l];
        }
      }
      return best[1];
    }
    function kindMap(kind) {
      const at = kind.layers.indexOf(kind.key.startsWith('injected') ? kind.layers[0] : view.layer);
      if (at < 0) return null;
      const { start, n } = image();
      const total = data.images.reduce((sum, i) => sum + i.n, 0);
      return kind.values.slice(at * total + start, at * total + start + n);
    }
    function limits(values, fixed, low, high, diverging) {
      if (fixed) return [low, high];
      const finite = [...values].filter(Number.isFinite);
      if (!finite.length) return [low, high];
      const most = Math.max(...finite);
      if (diverging) {
        const edge = Math.max(...finite.map(Math.abs)) || 1;
        return [-edge, edge];
      }
      const least = Math.min(...finite);
      return [least > 0 && least < most / 2 ? 0 : least, most > least ? most : least + 1];
    }

    /* ---- drawing */
    function draw() {
      if (!data) return;
      root.replaceChildren(controls(), html('div', { class: 'dl-look-body' }, [wordsPanel(), html('div', { class: 'dl-maps' })]));
      redraw();
    }

    function controls() {
      const has = (mode) => (mode === 'attention' ? data.attention : kinds(mode).length);
      const modes = html(
        'div',
        { class: 'dl-segment', role: 'group', 'aria-label': 'What the map shows' },
        MODES.filter(([mode]) => has(mode)).map(([mode, name]) =>
          html('button', {
            type: 'button', text: name, 'aria-pressed': String(mode === view.mode), class: mode === view.mode ? 'dl-on' : '',
            onclick: () => { view.mode = mode; draw(); root.querySelector('.dl-segment .dl-on').focus(); },
          }),
        ),
      );
      const last = view.mode === 'residual' ? data.layers : data.layers - 1;
      if (view.layer > last) view.layer = last;
      const name = () => (view.layer === data.layers ? 'final output' : `layer ${view.layer}`);
      const shown = html('output', { text: name() });
      const layer =
        view.mode === 'injected'
          ? null
          : html('label', { class: 'dl-slide' }, [
              html('span', { text: 'Layer' }),
              html('input', {
                type: 'range', min: 0, max: last, step: 1, value: view.layer, 'aria-label': 'Layer',
                oninput: (event) => { view.layer = Number(event.target.value); shown.textContent = name(); redraw(); },
              }),
              shown,
            ]);
      const parts = [modes, layer];
      if (view.mode === 'attention') {
        const a = data.attention;
        parts.push(
          html('label', {}, [
            html('span', { text: 'Head' }),
            html('select', { 'aria-label': 'Head', onchange: (event) => { view.head = event.target.value; redraw(); } }, [
              html('option', { value: 'mean', text: 'mean of all', selected: view.head === 'mean' }),
              ...Array.from({ length: a.heads }, (_, h) =>
                html('option', { value: String(h), text: `head ${h}`, selected: view.head === String(h) }),
              ),
            ]),
          ]),
        );
        if (data.spelt) {
          parts.push(check('token by token', view.letters, (on) => { view.letters = on; pin.word = 0; units(true); draw(); }));
        }
        const any = a.sinks.some((s) => s.length);
        parts.push(check('hide sinks', view.hide, (on) => { view.hide = on; redraw(); }, !any));
      }
      parts.push(check('one scale for all layers', view.fixed, (on) => { view.fixed = on; redraw(); }));
      if (data.images.length > 1) {
        parts.push(
          html('label', {}, [
            html('span', { text: 'Image' }),
            html('select', { 'aria-label': 'Image', onchange: (event) => { view.image = Number(event.target.value); pin.patch = null; redraw(); } },
              data.images.map((_, i) => html('option', { value: i, text: String(i + 1), selected: i === view.image }))),
          ]),
        );
      }
      return html('div', { class: 'dl-look-controls' }, parts);
    }
    function check(name, on, call, disabled) {
      return html('label', { class: disabled ? 'dl-disabled' : '' }, [
        html('input', { type: 'checkbox', checked: on, disabled, onchange: (event) => call(event.target.checked) }),
        html('span', { text: name }),
      ]);
    }

    function wordsPanel() {
      const a = data.attention;
      const word = (text, index, title) =>
        html('button', {
          type: 'button', class: 'dl-word', 'data-word': index, title, text: text.trim() || '␣',
          disabled: index >= 0 && !data.units[index].tokens.length,
          onmouseenter: () => { preview.word = index; redraw(); },
          onmouseleave: () => { preview.word = null; redraw(); },
          onfocus: () => { preview.word = null; },
          onclick: () => { pin.word = pin.word === index ? null : index; pin.patch = null; redraw(); },
          onkeydown: (event) => stepWord(event, index),
        });
      const asked = a ? data.question.map((text, i) => word(text, i - a.asked, 'a word of the question')) : [];
      const said = data.units.map((w, i) => word(w.text, i, `${percent(w.p)}`));
      return html('div', { class: 'dl-words-panel' }, [
        asked.length ? html('div', { class: 'dl-asked', 'aria-label': 'question' }, asked) : null,
        html('div', { class: 'dl-said', 'aria-label': 'answer' }, said),
        html('p', { class: 'dl-readout', 'aria-live': 'polite' }),
        html('p', { class: 'dl-say' }),
      ]);
    }
    function stepWord(event, index) {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      const all = [...root.querySelectorAll('.dl-word:not([disabled])')];
      const next = all[all.findIndex((b) => Number(b.dataset.word) === index) + by];
      if (!next) return;
      pin.word = Number(next.dataset.word);
      pin.patch = null;
      redraw();
      next.focus();
    }

    /* Only what changes with hover, layer or head: the maps, the words' shading, the sentences. */
    function redraw() {
      if (!data) return;
      const maps = root.querySelector('.dl-maps');
      const patch = preview.patch ?? pin.patch;
      const word = preview.word ?? (patch === null ? pin.word : null);
      let readout = '';
      let say = data.captions[view.mode];
      const drawn = [];
      if (view.mode === 'attention') {
        const values = word === null ? averageMap() : wordMap(word);
        if (values) {
          const [low, high] = limits(values, view.fixed && view.head === 'mean', 0, wordLimitOf(word), false);
          drawn.push(map(values, low, high, false, 'share of attention', word === null ? 'mean of the answer' : null));
          readout = told(values, word, patch);
        }
        if (patch !== null) say = data.captions.readers;
      } else {
        const shown = kinds(view.mode);
        const all = shown.map(kindMap).filter(Boolean);
        const low = Math.min(...shown.map((k) => k.low));
        const high = Math.max(...shown.map((k) => k.high));
        shown.forEach((kind) => {
          const values = kindMap(kind);
          const title = kind.source !== undefined ? `${kind.label} → layer ${kind.layers[0]}` : kind.label;
          if (!values) {
            drawn.push(html('div', { class: 'dl-empty' }, [
              html('b', { text: 'Nothing enters before this layer' }),
              html('p', { text: `There is something before layer ${kind.layers.join(', ')}.` }),
            ]));
            return;
          }
          const [a, b] = limits(view.mode === 'injected' ? all.flatMap((v) => [...v]) : values, view.fixed, low, high, kind.diverging);
          drawn.push(map(values, a, b, kind.diverging, kind.unit, title, kind.source));
          if (patch !== null) readout += `${title}: ${short(values[patch])} ${kind.unit} at ${where(patch)}. `;
        });
        say = `${data.captions[view.mode]} ${view.mode === 'residual' ? data.captions.map : ''}`;
      }
      maps.classList.toggle('dl-many', drawn.length > 1);
      maps.replaceChildren(...drawn);
      root.querySelector('.dl-readout').textContent = readout || (view.mode === 'attention' ? '' : 'Point at a token of the image for its value.');
      root.querySelector('.dl-say').textContent = say;
      shade(word, patch);
      tellState();
    }
    const wordLimitOf = (word) => (word === null ? Math.max(...data.units.map((w, i) => (w.tokens.length ? wordLimit(i) : 0)), 1e-9) : wordLimit(word));
    function averageMap() {
      const words = data.units.map((w, i) => (w.tokens.length ? wordMap(i) : null)).filter(Boolean);
      if (!words.length) return null;
      const out = new Float64Array(words[0].length);
      words.forEach((values) => values.forEach((v, i) => (out[i] += v / words.length)));
      return out;
    }
    const where = (patch) => `row ${Math.floor(patch / image().grid[1])}, column ${patch % image().grid[1]}`;
    function told(values, word, patch) {
      const sum = values.reduce((s, v) => s + (Number.isFinite(v) ? v : 0), 0);
      const who = view.head === 'mean' ? 'mean of heads' : `head ${view.head}`;
      if (patch !== null) {
        return `${where(patch)}: ${percent(values[patch])} of the attention, layer ${view.layer}, ${who}. Words shaded by how much they look here.`;
      }
      const sinks = data.attention.sinks[view.layer].length;
      const more = !data.attention.sinksKnown
        ? ' Sinks cannot be told: too few rows.'
        : sinks ? ` ${sinks} sink ${sinks === 1 ? 'patch' : 'patches'} (dotted)${view.hide ? ', hidden' : ''}.` : '';
      const name = word === null ? 'The answer on average' : `“${(word < 0 ? data.question[data.attention.asked + word] : data.units[word].text).trim()}”`;
      return `${name} gives ${percent(sum)} of its attention to this image, layer ${view.layer}, ${who}.${more}`;
    }

    function map(values, low, high, diverging, unit, title, source) {
      const { src, size, grid } = image();
      const [rows, columns] = grid;
      const W = 320;
      const ratio = lens.ratio(size);
      const H = W * ratio;
      const w = W / columns;
      const h = H / rows;
      const canvas = svg('svg', {
        viewBox: `0 0 ${W} ${H}`, class: 'dl-map', tabindex: 0, role: 'img',
        style: `max-width: min(100%, ${Math.round(Math.min(520, 520 / ratio))}px)`,
        'aria-label': `${title || 'Attention'} on the image, ${rows} × ${columns} tokens. Arrow keys step over tokens, Enter pins.`,
      });
      canvas.append(svg('image', { href: src, width: W, height: H, preserveAspectRatio: 'none' }));
      values.forEach((v, i) => {
        if (!Number.isFinite(v)) return;
        const t = (v - low) / (high - low || 1);
        const fill = diverging ? ramp(data.diverging, t) : ramp(data.ramp, t);
        canvas.append(svg('rect', {
          x: (i % columns) * w, y: Math.floor(i / columns) * h, width: w + 0.3, height: h + 0.3, fill,
          'fill-opacity': diverging ? 0.15 + 0.7 * Math.abs(2 * t - 1) : 0.16 + 0.66 * Math.min(1, Math.max(0, t)),
        }));
      });
      const outline = (i, name) => canvas.append(svg('rect', { x: (i % columns) * w + 0.7, y: Math.floor(i / columns) * h + 0.7, width: w - 1.4, height: h - 1.4, class: name }));
      if (view.mode === 'attention') {
        const { start, n } = image();
        data.attention.sinks[view.layer].filter((s) => s >= start && s < start + n).forEach((s) => outline(s - start, 'dl-sink'));
      }
      if (pin.patch !== null) outline(pin.patch, 'dl-pinned');
      if (preview.patch !== null && preview.patch !== pin.patch) outline(preview.patch, 'dl-preview');
      const at = (event) => {
        const box = canvas.getBoundingClientRect();
        const c = Math.floor(((event.clientX - box.left) / box.width) * columns);
        const r = Math.floor(((event.clientY - box.top) / box.height) * rows);
        return Math.max(0, Math.min(rows - 1, r)) * columns + Math.max(0, Math.min(columns - 1, c));
      };
      const figure = html('figure', { class: 'dl-figure', style: source !== undefined ? `--c: var(--source-${source}-text)` : null }, [
        title ? html('figcaption', { text: title }) : null,
        html('div', { class: 'dl-hover' }, canvas),
        bar(low, high, diverging, unit),
      ]);
      const hover = figure.querySelector('.dl-hover');
      hover.addEventListener('mousemove', (event) => {
        const i = at(event);
        lens.tip(view.mode === 'attention' ? percent(values[i]) : `${short(values[i])} ${unit}`, event.clientX, event.clientY);
        if (preview.patch === i) return;
        preview.patch = i;
        shade(null, i);
        mark(i);
      });
      hover.addEventListener('mouseleave', () => { preview.patch = null; lens.tip(''); redraw(); });
      hover.addEventListener('click', (event) => { const i = at(event); pin.patch = pin.patch === i ? null : i; preview.patch = null; redraw(); });
      canvas.addEventListener('keydown', (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
        if (step === undefined) return;
        event.preventDefault();
        const next = (pin.patch ?? 0) + (pin.patch === null ? 0 : step);
        if (next < 0 || next >= values.length) return;
        pin.patch = next;
        const index = [...root.querySelectorAll('.dl-map')].indexOf(canvas);
        redraw();
        root.querySelectorAll('.dl-map')[index]?.focus();
      });
      return figure;
    }
    /* The hovered token's outline on every map, without drawing the maps anew. */
    function mark(i) {
      root.querySelectorAll('.dl-map').forEach((canvas) => {
        canvas.querySelector('.dl-preview')?.remove();
        const [rows, columns] = image().grid;
        const [, , W, H] = canvas.getAttribute('viewBox').split(' ').map(Number);
        canvas.append(svg('rect', {
          x: ((i % columns) * W) / columns + 0.7, y: (Math.floor(i / columns) * H) / rows + 0.7,
          width: W / columns - 1.4, height: H / rows - 1.4, class: 'dl-preview',
        }));
      });
    }
    function bar(low, high, diverging, unit) {
      const colours = diverging ? data.diverging : data.ramp;
      return html('div', { class: 'dl-bar' }, [
        html('span', { text: short(low) }),
        html('i', { style: `background: linear-gradient(to right, ${colours.join(',')})` }),
        html('span', { text: `${short(high)} ${unit}` }),
      ]);
    }
    /* Which words look at a token (shading), which one is pinned (outline). */
    function shade(word, patch) {
      const share = patch !== null && view.mode === 'attention' ? attend() : null;
      const start = image().start;
      const buttons = [...root.querySelectorAll('.dl-word')];
      const values = buttons.map((button) => {
        const index = Number(button.dataset.word);
        if (!share || button.disabled) return 0;
        const rows = rowsOfWord(index);
        return rows.reduce((sum, row) => sum + share(row, start + patch), 0) / rows.length;
      });
      const most = Math.max(...values, 1e-9);
      buttons.forEach((button, i) => {
        const index = Number(button.dataset.word);
        button.classList.toggle('dl-on', index === word && patch === null);
        button.setAttribute('aria-pressed', String(index === pin.word && pin.patch === null));
        button.style.background = share ? `color-mix(in srgb, var(--accent) ${Math.round((values[i] / most) * 70)}%, transparent)` : '';
      });
    }
    function tellState() {
      lens.looking = JSON.stringify({
        id: data.id, mode: view.mode, layer: view.layer, head: view.head, fixed: view.fixed, hide: view.hide,
        image: view.image, word: pin.word, tokens: pin.word !== null && pin.word >= 0 ? data.units[pin.word].tokens : [],
        asked: pin.word !== null && pin.word < 0 ? data.attention.asked + pin.word : null,
      });
    }

    lens.on('escape', () => {
      if (!data) return;
      pin.word = pin.patch = preview.word = preview.patch = null;
      redraw();
    });
    lens.on('heads', (value) => {
      if (!data || !data.attention || !value || value.id !== data.id) return;
      data.attention.heads_[value.layer] = halves(value.data);
      redraw();
    });
    watch('value', take);
    take();
  };
})();
