// Package particle has the declaration of the bridges to other programs, plugins.toml.
// What is made of it, and the rest of the project, lies in the folders.
package particle

import _ "embed"

// Plugins is plugins.toml.
//
//go:embed plugins.toml
var Plugins string
