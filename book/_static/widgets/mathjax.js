// embed.js asks MathJax 2's queue to typeset a widget's text. This hands the request to MathJax 3.
// Its listener is registered before embed.js's own, so the queue is there when the widgets are drawn.
// A page without formulas of its own does not load MathJax: then there is nothing to hand on.
window.addEventListener("load", () => {
  window.MathJax ??= {};
  MathJax.Hub = {
    Queue: ([, , element]) => MathJax.startup?.promise.then(() => MathJax.typesetPromise([element])),
  };
});
