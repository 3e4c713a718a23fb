package auth

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"

	"github.com/7d-solutions/identity-auth/db"
)

// importBatch is the number of accounts of one transaction.
const importBatch = 500

// importLine is one JSON line of `import FILE`.
type importLine struct {
	TenantID, UserID, Email, PasswordHash string
	Disabled                              bool
	Claims                                json.RawMessage
}

func (r *importLine) members() []member {
	return []member{
		{name: "tenant_id", text: &r.TenantID},
		{name: "user_id", text: &r.UserID},
		{name: "email", text: &r.Email},
		{name: "password_hash", text: &r.PasswordHash},
		{name: "disabled", flag: &r.Disabled, optional: true},
		{name: "claims", object: &r.Claims, optional: true},
	}
}

// row checks the line as register would, but for the password, whose hash must
// be one that a login can check.
func (r importLine) row(today Argon2Params) (row db.ImportRow, reason string) {
	var err error
	row.PasswordHash, row.Disabled, row.Claims = r.PasswordHash, r.Disabled, r.Claims
	if row.Claims == nil {
		row.Claims = json.RawMessage("{}")
	}
	if row.Tenant, err = db.ParseTenantID(r.TenantID); err != nil {
		return row, "tenant_id: not_a_uuid"
	}
	if row.User, err = db.ParseUserID(r.UserID); err != nil {
		return row, "user_id: not_a_uuid"
	}
	if row.Email, err = db.ParseEmail(r.Email); err != nil {
		return row, "email: not_an_email"
	}
	if _, err = parseHash(r.PasswordHash, today); err != nil {
		return row, "password_hash: " + err.Error()
	}
	if reason := checkClaims(row.Claims); reason != "" {
		return row, "claims: " + reason
	}
	return row, ""
}

// ImportCounts is what an import has come to.
type ImportCounts struct{ Lines, Created, Present, Bad int }

// Importer takes accounts over that have hashes already. What is there is left
// alone, so a second run changes nothing, and one after a crash completes it.
type Importer struct {
	store    *db.Store
	today    Argon2Params
	bad      func(line int, reason string)
	progress func(ImportCounts)

	counts ImportCounts
	batch  []db.ImportRow
	lines  []int // of the batch
	trace  string
}

// NewImporter reports bad lines by number, and progress after each batch.
func NewImporter(store *db.Store, today Argon2Params, bad func(line int, reason string), progress func(ImportCounts)) *Importer {
	return &Importer{store: store, today: today, bad: bad, progress: progress, trace: db.NewUUID()}
}

// JSONLines imports one account a line; empty lines count for nothing.
func (i *Importer) JSONLines(ctx context.Context, r io.Reader) (ImportCounts, error) {
	lines := bufio.NewReaderSize(r, 2*maxBody)
	for {
		line, tooLong, err := readLine(lines)
		if len(line) == 0 && err == io.EOF {
			err := i.flush(ctx)
			return i.counts, err
		}
		if err != nil && err != io.EOF {
			err = errors.Join(err, i.flush(ctx))
			return i.counts, err
		}
		i.counts.Lines++
		var in importLine
		var f *failure
		switch {
		case tooLong:
			i.reject("longer than 64 KiB")
		case len(line) == 0:
		case errors.As(decodeObject(line, in.members()), &f):
			i.reject(f.fields[0].Field + ": " + f.fields[0].Reason)
		default:
			if err := i.add(ctx, in); err != nil {
				return i.counts, err
			}
		}
	}
}

// readLine returns the next line without its end; of one that is too long only
// that.
func readLine(r *bufio.Reader) (line []byte, tooLong bool, err error) {
	line, more, err := r.ReadLine()
	for more && err == nil {
		tooLong = true
		_, more, err = r.ReadLine()
	}
	return line, tooLong || len(line) > maxBody, err
}

// FirstVersion imports the credentials table of the first version.
func (i *Importer) FirstVersion(ctx context.Context) (ImportCounts, error) {
	err := i.store.FirstVersionAccounts(ctx, func(tenant, user, email, hash string, active bool) error {
		i.counts.Lines++
		return i.add(ctx, importLine{TenantID: tenant, UserID: user, Email: email, PasswordHash: hash, Disabled: !active})
	})
	err = errors.Join(err, i.flush(ctx))
	return i.counts, err
}

func (i *Importer) reject(reason string) {
	i.counts.Bad++
	i.bad(i.counts.Lines, reason)
}

func (i *Importer) add(ctx context.Context, in importLine) error {
	row, reason := in.row(i.today)
	if reason != "" {
		i.reject(reason)
		return nil
	}
	i.batch, i.lines = append(i.batch, row), append(i.lines, i.counts.Lines)
	if len(i.batch) < importBatch {
		return nil
	}
	return i.flush(ctx)
}

func (i *Importer) flush(ctx context.Context) error {
	if len(i.batch) == 0 {
		return nil
	}
	outcomes, err := i.store.ImportAccounts(ctx, i.batch, i.trace)
	if err != nil {
		return err
	}
	for n, outcome := range outcomes {
		switch outcome {
		case db.ImportCreated:
			i.counts.Created++
		case db.ImportPresent:
			i.counts.Present++
		case db.ImportConflict:
			i.counts.Bad++
			i.bad(i.lines[n], "user_id or email belongs to another account")
		}
	}
	i.batch, i.lines = i.batch[:0], i.lines[:0]
	i.progress(i.counts)
	return nil
}
