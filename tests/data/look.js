/* Put at the end of a report by tests/test_report.py: what it looks like, told to the frame around it. */
{
  const problems = [], heights = [];
  for (const drawing of document.querySelectorAll("svg")) {
    const texts = [...drawing.querySelectorAll("text")].map(one => [one.textContent, one.getBoundingClientRect()]);
    texts.forEach(([name, a], i) => {
      if (a.left < 0 || a.right > innerWidth + 1) problems.push(`${name} leaves the page`);
      for (const [other, b] of texts.slice(i + 1)) {
        if (a.left + 1 < b.right && b.left + 1 < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom) {
          problems.push(`${name} lies over ${other}`);
        }
      }
    });
    heights.push(drawing.getBoundingClientRect().height);
  }
  if (document.documentElement.scrollWidth > innerWidth) problems.push("the page is wider than the screen");
  const tips = [...document.querySelectorAll(".chart")].map(chart => {
    const drawing = chart.querySelector("svg"), frame = drawing.getBoundingClientRect(), said = new Set();
    const parts = drawing.querySelectorAll("rect");
    for (let part = 0.05, low = false; part < 1; part += 0.1, low = !low) {
      const at = { clientX: frame.left + part * frame.width, clientY: frame.top + frame.height * (low ? 0.8 : 0.2), bubbles: true };
      const target = parts[Math.floor(part * parts.length)] || drawing;
      target.dispatchEvent(new PointerEvent("pointermove", at));
      said.add(chart.querySelector(".tip").textContent);
    }
    return [...said];
  });
  const { color: ink, backgroundColor: paper } = getComputedStyle(document.body);
  parent.postMessage({ problems, tips, heights, ink, paper, width: innerWidth, page: location.pathname.split("/").pop() }, "*");
}
