// Search on a page that was opened from a folder: there browsers start no Worker, so its script runs in a frame.
// Zensical would load such a script from another host; it leaves that out for one of this name (mkdocs.yml).
if (location.protocol === "file:") {
  const send = (message, handler) => {
    const data = structuredClone(message); // as with a Worker, neither side changes what the other has
    setTimeout(() => handler()?.({ data }));
  };
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.loaded = new Promise((resolve) => {
        this.frame.onload = () => { // Firefox replaces the frame's first document
          const inside = this.frame.contentWindow;
          inside.postMessage = (message) => send(message, () => this.onmessage);
          const script = inside.document.createElement("script");
          script.src = new URL(url, location.href);
          script.onerror = () => this.onerror?.(new Event("error", { cancelable: true }));
          script.onload = () => resolve(inside);
          inside.document.body.append(script);
        };
      });
      document.body.append(this.frame);
    }

    postMessage(message) {
      this.loaded.then((inside) => send(message, () => inside.onmessage));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
