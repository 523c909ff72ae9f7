const [key, order, group] = ["key", "order", "group"].map(id => document.getElementById(id));
const list = document.querySelector("main");
const cards = [...list.children].map(card => ({ card, values: JSON.parse(card.dataset.values) }));
groups.forEach(name => group.add(new Option(name, name)));
function arrange() {
  const sign = key.selectedOptions[0].dataset.sign * order.value;
  const value = item => item.values[key.value];
  const missing = item => value(item) === null;
  cards.sort((a, b) => missing(a) - missing(b) || sign * (value(a) - value(b)));
  cards.forEach(({ card }) => {
    card.hidden = group.value !== "" && card.dataset.group !== group.value;
    list.append(card);
  });
}
[key, order, group].forEach(control => control.addEventListener("change", arrange));
arrange();
