// Comfort only: every page works without this file.
"use strict";

// A changed quantity is sent at once; the Update button is for browsers without scripts.
for (const form of document.querySelectorAll("form.count")) {
  const button = form.querySelector("button");
  if (button) button.hidden = true;
  form.querySelector("input[name=qty]").addEventListener("change", () => form.reportValidity() && form.submit());
}

// A second click on a form that may be sent only once does nothing. The server would recognise it anyway.
for (const form of document.querySelectorAll("form[data-once]")) {
  form.addEventListener("submit", () => setTimeout(() => { form.querySelector("button").disabled = true; }, 0));
  addEventListener("pageshow", () => { form.querySelector("button").disabled = false; });
}

// While a product page is looked at, its stock figure stays true.
const stock = document.getElementById("stock");
if (stock) {
  const refresh = async () => {
    if (document.hidden) return;
    try {
      const answer = await fetch("/product/" + stock.dataset.product, { headers: { accept: "application/json" } });
      if (!answer.ok) return;
      const left = (await answer.json()).available;
      stock.textContent = left === 0 ? "Sold out" : left <= 5 ? "Only " + left + " left" : left + " in stock";
      stock.className = "stock " + (left === 0 ? "none" : left <= 5 ? "low" : "good");
    } catch { /* the next look will tell */ }
  };
  setInterval(refresh, 3000);
}
