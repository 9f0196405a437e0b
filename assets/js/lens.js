/* What all parts of the page share: the current plan, a small bus, the address, the word tooltip, the narrow rail.
   Knows nothing about models; values come from Python, text is only ever set as text. */
(() => {
  const listeners = {};
  const SVG = 'http://www.w3.org/2000/svg';
  const lens = (window.lens = { plan: '', picked: '', question: '', views: null, effect: null });

  lens.on = (name, call) => (listeners[name] ||= []).push(call);
  lens.emit = (name, data) => (listeners[name] || []).forEach((call) => call(data));

  /* An element with attributes and children; `on…` are listeners, null and false are left out. */
  function make(create, tag, attributes, children) {
    const node = create(tag);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (key === 'text') node.textContent = value;
      else if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
      else node.setAttribute(key, value === true ? '' : value);
    }
    node.append(...[children || []].flat().filter((child) => child !== null && child !== undefined));
    return node;
  }
  lens.html = (tag, attributes, children) => make((t) => document.createElement(t), tag, attributes, children);
  lens.svg = (tag, attributes, children) => make((t) => document.createElementNS(SVG, t), tag, attributes, children);

  /* Height by width of an image of this size where it is drawn: of one much longer than wide, or wider than high, less,
     so that its tokens can be told apart. */
  lens.ratio = ([width, height]) => Math.min(5, Math.max(0.2, height / width));

  lens.colour = (source) => `var(--source-${source})`;
  lens.percent = (p) => (p >= 0.995 && p < 1 ? '99+ %' : p < 0.005 && p > 0 ? '<1 %' : `${Math.round(p * 100)} %`);

  lens.tab = () => {
    const selected = document.querySelector('#dl-tabs [role=tab][aria-selected=true]');
    return selected ? selected.textContent.trim().toLowerCase() : 'chat';
  };

  /* The address follows the page; nothing is loaded again. Fields of other programs stay. */
  lens.place = (query) => {
    const now = new URLSearchParams(location.search);
    const next = new URLSearchParams(query);
    for (const key of ['m', 'p', 'x', 'q', 't']) now.delete(key);
    next.forEach((value, key) => now.set(key, value));
    if (lens.tab() !== 'chat') now.set('t', lens.tab());
    const text = now.toString().replaceAll('%40', '@').replaceAll('%2C', ',').replaceAll('%2F', '/');
    history.replaceState(history.state, '', location.pathname + (text ? `?${text}` : '') + location.hash);
  };

  /* ---- components that only carry values */
  lens.carry = (name) => (element, props, trigger, watch) => {
    const tell = () => {
      lens[name] = props.value;
      lens.emit(name, props.value);
    };
    watch('value', tell);
    tell();
  };

  lens.on('plan', (plan) => document.querySelectorAll('.dl-rail-bar code').forEach((code) => (code.textContent = plan)));
  /* An answer that was given under another plan than the picture's says so. */
  lens.on('plan', (plan) =>
    document
      .querySelectorAll('[data-answered]')
      .forEach((card) => card.classList.toggle('dl-stale', card.dataset.answered !== `${lens.model} ${plan}`)),
  );
  lens.on('link', (query) => query && setTimeout(() => lens.place(query), 60)); // after a tab has been opened with it

  /* ---- what is asked in Stacks. Gradio draws the states of two events as they come to it, which need not be their
     order: once all of them have been drawn, 'drawn' is told, so that what is shown can be looked at. */
  let asked = 0;
  let stopped = false; // a question that has left the line has drawn nothing, and is not to be asked again
  const count = (more) => {
    asked = Math.max(0, asked + more);
    ['dl-live-answer', 'dl-live-more'].forEach((id) => document.getElementById(id)?.setAttribute('aria-busy', asked > 0));
  };
  lens.asked = () => {
    count(1);
    stopped = false;
  };
  lens.stopped = () => (stopped = true);
  lens.drawn = (well) => {
    count(-1);
    if (well) setTimeout(() => asked || stopped || lens.emit('drawn'), 100); // ms: when it can be seen
  };

  /* ---- clickable pieces of HTML that Python wrote: data-plan sets a plan, data-pick picks an example, data-go tells
     the event of that name, with data-name */
  lens.clicks = (element, props, trigger) => {
    element.addEventListener('click', (event) => {
      const target = event.target.closest('[data-plan],[data-pick],[data-go]');
      if (!target || !element.contains(target)) return;
      if (target.dataset.plan !== undefined) lens.emit('set-plan', target.dataset.plan);
      else {
        lens.picked = target.dataset.pick ?? target.dataset.name;
        trigger(target.dataset.go || 'pick', { name: lens.picked });
      }
    });
  };

  /* ---- the tooltip of words and maps: shown at once on hover or focus, text only */
  let tip;
  lens.tip = (text, x, y) => {
    if (!tip) {
      tip = lens.html('div', { class: 'dl-tip', role: 'tooltip', id: 'dl-tip' });
      document.body.append(tip);
    }
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(x - box.width / 2, innerWidth - box.width - 8))}px`;
    tip.style.top = `${y - box.height - 10 < 8 ? y + 22 : y - box.height - 10}px`;
  };
  function tipFor(event) {
    const word = event.target.closest?.('.dl-w, .dl-tipped, .dl-badge');
    if (!word) return;
    if (word.title) {
      word.dataset.tip = word.title;
      word.removeAttribute('title');
    }
    const box = word.getBoundingClientRect();
    lens.tip(word.dataset.tip, box.left + box.width / 2, box.top);
  }
  document.addEventListener('mouseover', tipFor);
  document.addEventListener('focusin', tipFor);
  for (const name of ['mouseout', 'focusout', 'scroll']) {
    document.addEventListener(name, (event) => (name === 'scroll' || event.target.closest?.('.dl-w, .dl-tipped, .dl-badge')) && lens.tip(''), true);
  }
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Escape') {
      lens.tip('');
      lens.emit('escape');
    }
  });

  /* The open tab is part of the address, too. */
  document.addEventListener('click', (event) => {
    if (event.target.closest('#dl-tabs [role=tab]')) setTimeout(() => lens.link && lens.place(lens.link), 0);
  });

  /* ---- small things that every click may mean */
  document.addEventListener('click', (event) => {
    /* Gradio gives the page a base address without its query: followed, a link to a place on it would load it anew. */
    const inside = event.target.closest('.gradio-container a[href^="#"]');
    if (inside) {
      event.preventDefault();
      const place = document.getElementById(inside.getAttribute('href').slice(1));
      if (!place) return;
      place.setAttribute('tabindex', '-1');
      place.focus({ preventScroll: true });
      place.scrollIntoView();
    }
    const copy = event.target.closest('.dl-copy');
    if (copy) {
      const answer = copy.closest('.message-content, .dl-answer')?.querySelector('.dl-words');
      if (answer) navigator.clipboard?.writeText(answer.textContent.trim());
      copy.textContent = 'copied';
      setTimeout(() => (copy.textContent = 'copy'), 1200);
    }
    const command = event.target.closest('.dl-copy-code');
    if (command) {
      navigator.clipboard?.writeText(command.dataset.copy ?? command.previousElementSibling.textContent);
      command.textContent = 'copied';
      setTimeout(() => (command.textContent = 'copy'), 1200);
    }
    const link = event.target.closest('.dl-copy-link');
    if (link) {
      navigator.clipboard?.writeText(location.href);
      link.textContent = 'copied';
      setTimeout(() => (link.textContent = 'copy link'), 1200);
    }
    const bar = event.target.closest('.dl-rail-bar');
    if (bar) {
      const open = document.getElementById('dl-rail').classList.toggle('dl-open');
      bar.setAttribute('aria-expanded', open);
    }
  });

  /* The chat labels a message with its markup; people who listen get its words instead. */
  const label = () =>
    document.querySelectorAll('#dl-chat [data-testid=bot][aria-label*="<"]').forEach((message) => {
      message.setAttribute('aria-label', `answer: ${message.querySelector('.dl-words')?.textContent.trim() || ''}`);
    });
  new MutationObserver(label).observe(document.documentElement, { childList: true, subtree: true, characterData: true });
})();
