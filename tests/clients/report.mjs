// Does each work in turn and prints a line `<what>: ok`, or what went wrong.
export async function report(works) {
  for (const [name, work] of Object.entries(works)) {
    try {
      await work();
      console.log(`${name}: ok`);
    } catch (error) {
      console.error(name, error);
      console.log(`${name}: ${String(error.message).split("\n")[0]}`);
    }
  }
}
