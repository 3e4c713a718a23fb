// Package sql holds the migrations, NNNN_name.sql, for package migrate.
// Tables are named without a schema: package migrate chooses it.
package sql

import "embed"

// FS holds the migration files. One that was ever released is never edited:
// databases keep its checksum, and a binary with another one refuses to start.
//
//go:embed *.sql
var FS embed.FS
