// Two sets of marks that came from one, as one: what either side changed is taken, and what both wrote is kept.
// Knows pins, groups, names and notes. Refuses to know elements of the page and where marks are kept.

/** For each key of any: mine where theirs is as before, theirs where mine is; `both` says what becomes of two changes. */
function merged(base, mine, theirs, both) {
  const found = new Map();
  const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
  for (const key of new Set([...theirs.keys(), ...mine.keys()])) {
    const [was, my, their] = [base.get(key), mine.get(key), theirs.get(key)];
    const kept = same(my, was) ? their : same(their, was) || same(my, their) ? my : both(my, their);
    if (kept !== undefined) found.set(key, kept);
  }
  return found;
}

const flags = (rows) => new Map([...rows].map((row) => [row, true]));
const named = (groups) => new Map(groups.map((group) => [group.name, group]));

/** The marks of both; a node that is in two groups then stays in the first. */
export function mergeMarks(base, mine, theirs) {
  const eitherText = (my, their) => (my && their ? `${their}\n${my}` : (my ?? their));
  const eitherName = (my, their) => my ?? their;
  const eitherGroup = (my, their) =>
    my && their ? { ...my, rows: [...new Set([...their.rows, ...my.rows])] } : (my ?? their);
  const taken = new Set();
  const groups = [];
  for (const group of merged(
    named(base.groups),
    named(mine.groups),
    named(theirs.groups),
    eitherGroup,
  ).values()) {
    const rows = group.rows.filter((row) => !taken.has(row));
    rows.forEach((row) => taken.add(row));
    if (rows.length) groups.push({ ...group, rows });
  }
  return {
    pins: new Set(merged(flags(base.pins), flags(mine.pins), flags(theirs.pins), () => true).keys()),
    groups,
    names: merged(base.names, mine.names, theirs.names, eitherName),
    notes: merged(base.notes, mine.notes, theirs.notes, eitherText),
  };
}
