package auth

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/7d-solutions/identity-auth/db"
	"github.com/7d-solutions/identity-auth/db/dbtest"
)

func TestMain(m *testing.M) { os.Exit(dbtest.Main(m)) }

func TestImportReportsLinesByNumber(t *testing.T) {
	store, err := db.Open(dbtest.New(t), 4, db.Rules{})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	const tenant, good = "11111111-1111-4111-8111-111111111111", `"$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW"`
	line := func(user int, email, hash, more string) string {
		return fmt.Sprintf(`{"tenant_id":%q,"user_id":"22222222-2222-4222-8222-%012d","email":%q,"password_hash":%s%s}`, tenant, user, email, hash, more)
	}
	file := strings.Join([]string{
		line(1, "one@example.com", good, ""),
		`{"tenant_id":"x"`,
		"",
		line(2, "two@example.com", good, `,"disabled":true,"claims":{"roles":["a"]}`),
		line(3, "not an address", good, ""),
		line(4, "four@example.com", `"plain"`, ""),
		line(5, "five@example.com", good, `,"claims":{"sub":"x"}`),
		line(6, "six@example.com", good, `,"claims":"x"`),
		line(7, "one@example.com", good, ""),
		line(8, "eight@example.com", good, `,"more":1`),
		line(9, "nine@example.com", `"`+strings.Repeat("x", 70<<10)+`"`, ""),
		line(10, "ten@example.com", good, `,"disabled":1`),
		line(11, "eleven@example.com", good, ""), // the last line has no end
	}, "\n")
	for run, want := range []ImportCounts{{13, 3, 0, 9}, {13, 0, 3, 9}} {
		var bad []string
		importer := NewImporter(store, today, func(line int, reason string) { bad = append(bad, fmt.Sprint(line, " ", reason)) }, func(ImportCounts) {})
		got, err := importer.JSONLines(t.Context(), strings.NewReader(file))
		if err != nil || got != want {
			t.Errorf("run %d: got %+v, %v; want %+v", run, got, err, want)
		}
		wantBad := []string{
			"2 body: not_json", "5 email: not_an_email", "6 password_hash: " + errHashForm.Error(), "7 claims: not_an_object_of_free_names",
			"8 claims: wrong_type", "10 more: unknown", "11 longer than 64 KiB", "12 disabled: wrong_type", "9 user_id or email belongs to another account",
		}
		if strings.Join(bad, "\n") != strings.Join(wantBad, "\n") {
			t.Errorf("run %d: bad lines\n%s\nwant\n%s", run, strings.Join(bad, "\n"), strings.Join(wantBad, "\n"))
		}
	}
}
