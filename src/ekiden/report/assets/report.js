// Unpack plotly.js, which lies compressed in this page, and show the run.
"use strict";
(async () => {
  const show = () => window.ekiden.show(JSON.parse(document.getElementById("data").textContent));
  try {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), c => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    show();
  } catch (error) {
    window.ekidenTables(JSON.parse(document.getElementById("data").textContent));
    document.getElementById("charts").textContent = `The curves need a browser of 2023 or later (${error}).`;
    throw error;
  }
})();
