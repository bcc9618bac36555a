package store

// testPoint is called at the steps of Commit and GC, with the name of the step, so
// that tests can end the process there.
var testPoint = func(step string) {}
