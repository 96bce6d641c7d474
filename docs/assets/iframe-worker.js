// A browser starts no worker from a page that was opened as a file. There a hidden frame does the
// work of the search, so that it needs no server. On a server nothing changes.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.title = "search";
      this.frame.srcdoc = "<!doctype html><title>search</title>";
      this.begun = new Promise((done) => {
        this.frame.addEventListener("load", () => this.start(String(address), done));
      });
      document.body.append(this.frame);
    }

    start(address, done) {
      const inside = this.frame.contentWindow;
      // what the script inside answers with goes to whoever asked
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = inside.document.createElement("script");
      script.addEventListener("load", done);
      script.src = address;
      inside.document.body.append(script);
    }

    async postMessage(data) {
      await this.begun;
      const inside = this.frame.contentWindow;
      inside.dispatchEvent(new inside.MessageEvent("message", { data }));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
